"""Client libraries, and the generator of the parts that come from the OpenAPI document."""
