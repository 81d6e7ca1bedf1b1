"""Certificates as a service: a gRPC server beside the local library, its store, and a client that reads like it."""
