"""Where images come from: folders, manifests, tars, data set files; what is remembered of them."""
