"""Library of node types, each a pair of files; `nodes.catalog` describes their format."""
