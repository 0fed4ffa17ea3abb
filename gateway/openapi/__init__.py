"""The document of the API, OpenAPI 3.1, made from the table of routes and the wire types; and a page of it to read."""
