"""What a run was and what came of it, on one page that needs nothing else.

python -m flowerbed.report RUN [RUN …] writes RUN/report.html into the directory of the results, or,
for more than one run, a page that compares them.

    record      a run, read back from its files        usage       what devices used: Prometheus
    findings    what the numbers say, in plain words   pictures    SVG
    elements    HTML                                   page, comparison
"""
