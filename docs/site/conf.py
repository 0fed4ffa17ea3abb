"""Configuration of Sphinx; `docs.site.build` passes the version."""

project = "Pilotflame"
root_doc = "index"
extensions = ["myst_parser"]
# The anchors that GitHub makes, so that a link works in a checkout and on the site.
myst_heading_anchors = 6
html_theme = "furo"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_use_index = False
html_permalinks_icon = "#"
smartquotes = False
suppress_warnings = [
    "misc.highlighting_failure",  # fences show JSON with comments and cut output, which no lexer accepts
    "myst.header",  # a license begins with the heading that its owner gave it
    "toc.not_included",  # a test checks that links lead from the contents to every page
]
templates_path = ["templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/api.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
