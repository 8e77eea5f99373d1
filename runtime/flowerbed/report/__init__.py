"""The report of a run: what was run and what came of it, on one page without outside resources.

`python -m flowerbed.report RUN [RUN …]` writes RUN/report.html into the directory of the results,
or, for several runs, one page that compares them.

    record      reads a run from its files           usage       asks Prometheus what devices used
    findings    the results in sentences             pictures    SVG
    elements    HTML                                 page, comparison
"""
