"""From a name in a request to a model: ids, aliases, files under `models_dir`, user/repo:VARIANT.

Knows how files on disk become models, and which settings each model has in the end.
It reads names and a file's first bytes; what is in a model's header is model_file's knowledge.
May import: config, model_file, values of planner, errors, types. No process, database or HTTP.
"""
