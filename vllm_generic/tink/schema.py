# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tables of the service's database."""

TABLES = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    created REAL NOT NULL,
    last_seen REAL NOT NULL,
    finished TEXT,
    display_name TEXT,
    metadata TEXT
);
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY,
    session_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    base_model TEXT NOT NULL,
    spec TEXT NOT NULL,
    metadata TEXT,
    created REAL NOT NULL,
    last_request REAL NOT NULL,
    snapshot_seq INTEGER NOT NULL DEFAULT -1
);
CREATE TABLE IF NOT EXISTS samplers (
    id TEXT PRIMARY KEY,
    session_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    model_path TEXT,
    folder TEXT,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS checkpoints (
    path TEXT PRIMARY KEY,
    run_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    request_id TEXT NOT NULL,
    spec TEXT NOT NULL,
    size INTEGER NOT NULL,
    created REAL NOT NULL,
    expires REAL,
    public INTEGER NOT NULL DEFAULT 0,
    metadata TEXT
);
CREATE TABLE IF NOT EXISTS operations (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    queue TEXT NOT NULL,
    seq INTEGER NOT NULL,
    kind TEXT NOT NULL,
    body BLOB,
    digest BLOB NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending',
    content_type TEXT,
    result BLOB,
    finished REAL
);
CREATE INDEX IF NOT EXISTS operations_of_queue ON operations (queue, seq);
CREATE TABLE IF NOT EXISTS adapters (
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    folder TEXT NOT NULL,
    created REAL NOT NULL,
    PRIMARY KEY (owner, name)
);
CREATE TABLE IF NOT EXISTS history (
    run_id TEXT NOT NULL,
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (run_id, step)
);
"""
