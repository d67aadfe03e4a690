"""The workers that answer clients: whose request, which model, is its server ready, relay.

Knows HTTP and OpenAI's shapes. It asks the manager through the state file only: it starts, stops
and measures nothing. Here are the request's way and the application; bytes are in wire/, one
request on one server in relay/, gunicorn's worker in worker/, answers from the file in pages/.
May import: catalog, config, state, entities, errors, lifetime, log, types. flask, gunicorn.
"""
