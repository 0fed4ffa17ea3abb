"""Client of tool servers by the Model Context Protocol (MCP) over HTTP; never over the streams of a local process."""
