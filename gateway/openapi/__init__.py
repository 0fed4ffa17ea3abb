"""OpenAPI 3.1 document of the API, built from the route table and the wire types."""
