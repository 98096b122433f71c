"""Who belongs to the cluster: certificates, keys, tokens, joining."""
