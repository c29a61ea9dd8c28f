"""Tests exploration in small worlds where every response can be listed, so regret is exact.

worlds          prompts, responses, rewards, a reference policy; pytrees made from a key
exact           values, optima, divergences, regret: sums over all responses
algorithms      the steps of a round; the losses are those of `objectives.losses`
rounds          rounds of sampling, feedback and fitting
theory          the constants of the SELM paper's theorem
many            runs many settings and seeds in one compiled program
experiments     the experiments, each a question about many runs
stats           intervals, slopes, corrections for many tests
plots           figures that contain their command
findings        the results in words, which an experiment's page begins with
page            the page of an experiment: answer, settings, figures and numbers
decoder_world   the same questions for a real `Decoder` trained by the packed update
"""
