"""What the preview endpoint offers, without Ray: options, requests, a store's adapters, drawing."""
