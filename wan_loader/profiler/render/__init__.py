"""A session as text, page, trace or picture. Pure."""
