"""Certificates for the host names of ingresses: from files, from an internal CA, or by ACME."""
