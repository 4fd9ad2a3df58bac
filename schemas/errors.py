"""Every error that a user can cause or meet, in one hierarchy.

SaeError
├── ConfigError        a key or value of the run config, or a command-line argument
├── CorpusError        an input file or one of its rows
├── SubjectError       the subject model, its tokenizer or its hook
├── AutoencoderError   an autoencoder's shape, state or checkpoint
├── WorkerError        a worker that was lost, or has too little memory
├── LakeError          the lake's files, log or version
│   ├── ConflictError  another writer committed the same unit of work first
│   └── IncompleteError  an earlier step has not finished
└── StorageError       reading or writing bytes: missing, unwritable, full

A message is one line: what was found and where, what was expected, how to mend it.
"""


class SaeError(Exception):
    """Base of all errors that the command line reports in one line, without a traceback."""


class ConfigError(SaeError):
    pass


class CorpusError(SaeError):
    pass


class SubjectError(SaeError):
    pass


class AutoencoderError(SaeError):
    pass


class WorkerError(SaeError):
    pass


class LakeError(SaeError):
    pass


class ConflictError(LakeError):
    pass


class IncompleteError(LakeError):
    pass


class StorageError(SaeError):
    pass
