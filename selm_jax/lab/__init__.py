"""Small worlds in which every response can be listed, so that regret is computed, not estimated.

worlds          prompts, responses, rewards, a reference policy; pytrees made from a key
exact           values, optima, divergences, the bilevel problem: sums over all responses
algorithms      rounds of sampling, feedback and fitting; the losses are `objectives.losses`
theory          the constants of the SELM paper's theorem
experiments     many runs in one compiled program, and what is asked of them
stats           intervals, slopes, corrections for many tests
plots           figures that carry their command
decoder_world   the same questions put to a real `Decoder` trained by the packed update
"""
