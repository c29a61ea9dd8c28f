"""People as a source of preferences: a local page on which they rank the answers to a prompt.

* `store`: questions and what people said of them, in one SQLite file; durable before it returns.
* `server`: the page and what it asks for; `render`: untrusted text as safe HTML.
* `agreement`: shares of wins, and Krippendorff's alpha.
* `exchange`: export and import in the layouts of TRL and UltraFeedback.

`feedback.human` is the ranker that reads the store.
"""
