"""What surrounds the exam in prepare.py: its data, the sandbox, one trial from start to score, the commands.

Imports run one way: prepare, then limits, files, signals and fingerprints, then text, tokenizer and rows, then speed,
load, card, processes and machine, then syscalls, sandbox and result, then reader, examiner, compiled, watch and trial,
then check and desk. Nothing here knows of the loop.
"""
