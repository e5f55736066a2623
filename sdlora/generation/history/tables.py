"""The tables of a history."""

from sdlora.generation.history.words import TOKENIZER

SCHEMA = 2
"""To be raised whenever the tables, or what is told of a picture, change: a history of another number is read again."""
TABLES = (
    """
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY,        -- time of the file, nanoseconds since 1970, or the next that is free: the order of answers
    place BLOB NOT NULL UNIQUE,    -- way from the folder, in the system's own bytes
    signature TEXT NOT NULL,       -- size and time of change
    problem TEXT NOT NULL,         -- why nothing is known of it; '' of one with a recipe
    identity TEXT NOT NULL,        -- SHA-256 of its recipe's text
    seed TEXT NOT NULL,            -- in digits: other programs' may be too large for a number
    base INTEGER NOT NULL,
    prompt TEXT NOT NULL,          -- as the index has it: `words.indexed`
    negative TEXT NOT NULL,
    facts TEXT NOT NULL            -- JSON of what is shown of it
)
""",
    "CREATE INDEX pictures_by_seed ON pictures (seed)",
    "CREATE INDEX pictures_by_base ON pictures (base)",
    "CREATE INDEX pictures_by_identity ON pictures (identity)",
    "CREATE TABLE bases (id INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL, UNIQUE (name, sha256))",
    """
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL, tensor_sha256 TEXT NOT NULL,
    UNIQUE (name, sha256, tensor_sha256)
)
""",
    "CREATE TABLE uses (adapter INTEGER NOT NULL, picture INTEGER NOT NULL, PRIMARY KEY (adapter, picture)) WITHOUT ROWID",
    "CREATE INDEX uses_by_picture ON uses (picture)",
    "CREATE TABLE ratings (identity TEXT PRIMARY KEY, stars INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE sources (name TEXT PRIMARY KEY, read INTEGER NOT NULL)",  # how far the file of ratings was read
    "CREATE VIRTUAL TABLE words USING fts5 (prompt, negative, content='pictures', content_rowid='id', "
    f"tokenize='{TOKENIZER}', prefix='1 2 3 4 5 6 7 8')",  # longer beginnings are gathered from all words that have them
    """
CREATE TRIGGER words_added AFTER INSERT ON pictures BEGIN
    INSERT INTO words (rowid, prompt, negative) VALUES (new.id, new.prompt, new.negative);
END
""",
    """
CREATE TRIGGER words_removed AFTER DELETE ON pictures BEGIN
    INSERT INTO words (words, rowid, prompt, negative) VALUES ('delete', old.id, old.prompt, old.negative);
    DELETE FROM uses WHERE picture = old.id;
END
""",
)
