"""Pictures of what the adapter does, drawn while it trains and by the preview endpoint."""
