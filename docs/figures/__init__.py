"""The pictures of README.md and docs/: drawn by code, committed as small SVG files.

``make figures`` draws them. What a picture says comes from where it is true: bars from the tables
of docs/benchmarks.md, the architecture from the package's imports. A test compares the committed
files with what is drawn, so none can go stale.
"""
