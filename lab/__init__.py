"""What agent_loop.py stands on, a room for each subject.

No import runs back up this list, and none leads from here to agent_loop.py:

  book        Experiment, results.tsv
  curve       loss curves
  profile     where the time of a training step goes, line by line
  runs        which runs compare: pure functions
  conditions  what seeds and the speed of the machine do to scores: pure functions
  posterior   P(better) by Bayes' rule on the scores of a night
  verdict     noise, better or not, run again or not: pure functions
  simpler     whether a change only takes code away
  trust       which idea of others is tried next, and when: pure functions
  repository  git
  researcher  Draft, Brief, Researcher; the built-in search
  peers       what travels: an edit with its evidence
  plumbing    git commands in a repository that strangers write to
  store       the shared experiments on this machine, in a git repository of their own
  exchange    ideas on their way to and from git remotes
  prompt      what a model is told
  answer      what a model answers
  api         one request to a model and its whole answer: failures, money
  command     one request to a command line of the owner's, such as claude -p, and its whole answer
  model       a language model as a researcher
  elsewhere   researchers that propose what another tag, or another machine, has kept
  demo        a train.py made worse on purpose, and five recorded ideas
  slots       the places that hold one trial each
  tag         one tag: branch, candidates, evidence, best, record, settle
  brief       what a researcher is told of a tag
  drafts      drafts on their way to a trial
  transfer    what was found elsewhere: as drafts, and how it has held here
  evening     who researches, and what is missing before a night can begin
  sharing     what this machine shares: rows of a tag as ideas
  launch      hold one trial: request -> Result
  measure     the runs of one candidate, and whose fault a failure is
  findings    what a tag has found, in numbers
  picture     the morning as one picture
  report      the morning in words
  page        the morning as one page
  view        the night on a terminal
  news        the night on a phone
"""
