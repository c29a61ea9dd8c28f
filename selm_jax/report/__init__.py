"""The report: one self-contained HTML page for one run, or for several side by side.

`data.py` reads a run folder into plain values, `texts.py` measures the answers' texts,
`summary.py` puts numbers and findings into words, `plots.py` draws single SVG plots,
`curves.py` and `run_plots.py` decide which plots a run deserves; `page.py` lays them out.
The page loads
nothing from anywhere: styles, script and plots are inside it, and so is every answer, as text.

    from selm_jax.report.page import write
    write([Path("runs/quickstart")], Path("runs/quickstart/report.html"))
"""
