"""HTML pages of one file each, which load nothing: one base template, one style, one script that paints the figures."""
