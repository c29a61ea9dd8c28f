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
samplers        who writes a query's responses: exact distributions from two sets of logits
arms            the methods of the field, each as one change of plain online DPO
contest         runs any arm in any world, in one compiled program
compare         every arm against online DPO, at its best strength; data and fit told apart
compare_page    the table of the comparison, and its sentences
verbs           what all commands share
decoder_world   the same questions for a real `Decoder` trained by the packed update
"""
