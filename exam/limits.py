"""What a trial may use, besides the time that its task allows. Read as limits.NAME, so that there is one of each."""

FILE_LIMIT = 8 * 2**30  # bytes of one file
DISK_LIMIT = 10 * 2**30  # bytes by which the disk may fill up during a trial
INODE_LIMIT = 200_000  # files, likewise
COPY_LIMIT = 30.0  # seconds for a copy of what a candidate has compiled
COMPILED_LIMIT = 2**29  # bytes of it
DISK_RESERVE = 2**28  # bytes that a trial leaves free
MEMORY_SHARE = 0.9  # of the machine's memory, for the candidate and its children together
PROCESS_LIMIT = 128  # processes of a candidate, counted once a second
THREAD_LIMIT = 2048  # threads and processes that a candidate can start, as an ordinary user
LOG_LIMIT = 2**20  # bytes of a candidate's output that are kept
