"""Collects human preferences on a local web page, where people rank the answers to a prompt.

* `store`: questions and people's rankings of the answers, in one SQLite file.
* `server`: the page and the requests that it sends; `render`: untrusted text as safe HTML.
* `agreement`: shares of wins, and Krippendorff's alpha.
* `exchange`: export and import in the layouts of TRL and UltraFeedback.

`feedback.human` is the ranker that reads the store.
"""
