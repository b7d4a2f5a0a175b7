"""Self-contained HTML pages: one base template, one style, one script that draws the figures."""
