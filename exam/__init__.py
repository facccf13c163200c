"""What surrounds the exam in prepare.py: its data, the sandbox, one trial from start to score, the commands.

Imports run one way: prepare, then limits and files, then text, tokenizer, rows, speed, machine, syscalls, sandbox,
processes and result, then reader, examiner, compiled, watch, trial, check and desk. Nothing here knows of the loop.
"""
