"""What a worker answers from the state file: health, status, metrics, models, load and unload.

Knows how rows become the JSON, the tables and the Prometheus text that users see. Their shapes
are in entities.py and openapi.yaml. It writes two things: demands for a load or an unload, and
counts of requests.
May import: proxy itself, its relay and wire, catalog, config, gpus, state, entities, errors, types.
"""
