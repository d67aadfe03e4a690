"""All SQL: the one file that workers and manager share, its tables, its transitions.

Knows who may write which column, and that a transition and its event are one transaction.
sqlite3 and SQL are used here and nowhere else. It decides nothing and reads no configuration.
May import: values of gpus and planner, errors, types. sqlite_utils.
"""
