"""One pair of files for each node type; `nodes.catalog` says what they hold."""
