"""Parts that several families are built of: UNets, text encoders, VAEs. No plug-ins."""
