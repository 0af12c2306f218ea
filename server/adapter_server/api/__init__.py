"""HTTP: validates, resolves and admits requests, and turns events into answers. The one door to fastapi."""
