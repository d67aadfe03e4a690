-- The tables of state.db, who writes each, and the views a person reads (docs/state.md).
--
-- One writing side per column: W = workers, M = the manager. Times are Unix seconds as if nobody
-- had set the clock since `clock` was written; memory is bytes.

-- M: one row, the manager itself
CREATE TABLE manager (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    pid INTEGER,
    started_at REAL,
    heartbeat_at REAL,
    stopping INTEGER NOT NULL DEFAULT 0,
    -- moves whenever something changes that workers route by
    generation INTEGER NOT NULL DEFAULT 0,
    -- gpu, cpu, or NULL before the first look
    mode TEXT CHECK (mode IN ('gpu', 'cpu')),
    mode_reason TEXT,
    driver_version TEXT,
    observed_at REAL,
    llama_server TEXT,
    build TEXT,
    -- how long the last decision took
    decision_s REAL
);
INSERT INTO manager (id) VALUES (1);

-- M: what turns the machine's monotonic seconds into Unix seconds that nobody sets (clock.py)
CREATE TABLE clock (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    -- monotonic seconds begin anew at each boot
    boot_id TEXT NOT NULL,
    -- Unix seconds at monotonic second 0
    offset_s REAL NOT NULL
);

-- M: every llama-server that lives or ended lately
CREATE TABLE servers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id TEXT NOT NULL,
    host TEXT NOT NULL DEFAULT '127.0.0.1',
    port INTEGER NOT NULL CHECK (port BETWEEN 1 AND 65535),
    pid INTEGER,
    -- when the process started, since the boot: with the pid it names one process (clock.py)
    pid_start_ticks INTEGER,
    state TEXT NOT NULL CHECK (state IN
        ('starting', 'ready', 'draining', 'stopping', 'stopped', 'failed')),
    -- why it is in this state, in words
    reason TEXT,
    api_key TEXT NOT NULL,
    command TEXT NOT NULL,
    log_path TEXT NOT NULL,
    -- file, build and settings it was started with: what measurements are kept under
    settings_key TEXT NOT NULL,
    on_cpu_for_want_of_gpu INTEGER NOT NULL DEFAULT 0,
    context_size INTEGER,
    parallel INTEGER,
    gpu_layers INTEGER,
    layer_count INTEGER,
    tensor_split TEXT,
    estimated_bytes INTEGER,
    measured_bytes INTEGER,
    host_estimated_bytes INTEGER,
    host_measured_bytes INTEGER,
    created_at REAL NOT NULL,
    ready_at REAL,
    state_changed_at REAL NOT NULL,
    load_s REAL,
    exit_code INTEGER,
    error_code TEXT,
    error_message TEXT,
    last_used_at REAL NOT NULL,
    -- from its own /metrics and /slots
    watched_at REAL,
    slots_total INTEGER,
    slots_busy INTEGER,
    requests_processing INTEGER,
    requests_deferred INTEGER,
    prompt_tokens_total REAL,
    predicted_tokens_total REAL,
    tokens_per_second REAL
);
CREATE UNIQUE INDEX one_live_server_per_model ON servers (model_id)
    WHERE state IN ('starting', 'ready', 'draining', 'stopping');
CREATE UNIQUE INDEX one_live_server_per_port ON servers (port)
    WHERE state IN ('starting', 'ready', 'draining', 'stopping');
CREATE INDEX servers_by_state ON servers (state, state_changed_at);

-- M: what each server was promised of each GPU, written before its process starts
CREATE TABLE assignments (
    server_id INTEGER NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    gpu_uuid TEXT NOT NULL,
    gpu_index INTEGER NOT NULL,
    estimated_bytes INTEGER NOT NULL,
    -- withheld from placing: the estimate, then max(measured, estimate)
    reserved_bytes INTEGER NOT NULL,
    measured_bytes INTEGER,
    -- what was free of the GPU when the server was given its share
    free_bytes INTEGER,
    PRIMARY KEY (server_id, gpu_uuid)
);

-- M: the GPUs as last seen
CREATE TABLE gpus (
    uuid TEXT PRIMARY KEY,
    gpu_index INTEGER NOT NULL,
    name TEXT NOT NULL,
    pci_bus_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('available', 'assigned', 'error')),
    error TEXT,
    total_bytes INTEGER NOT NULL,
    free_bytes INTEGER NOT NULL,
    used_bytes INTEGER NOT NULL,
    utilization REAL NOT NULL,
    temperature_c REAL,
    power_w REAL,
    compute_capability TEXT,
    mig INTEGER NOT NULL DEFAULT 0,
    -- learned: what a server takes beside its buffers
    overhead_bytes INTEGER,
    state_changed_at REAL NOT NULL
);
CREATE TABLE gpu_processes (
    gpu_uuid TEXT NOT NULL,
    pid INTEGER NOT NULL,
    name TEXT,
    used_bytes INTEGER,
    -- ours, or NULL for a stranger's
    server_id INTEGER,
    PRIMARY KEY (gpu_uuid, pid)
);

-- W inserts, renews and deletes; M fills the answer
CREATE TABLE demands (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL CHECK (kind IN ('load', 'unload', 'plan')),
    model_id TEXT NOT NULL,
    worker_id TEXT NOT NULL,
    -- asked for by a person through the API, not by a request: overrides the back-off
    explicit INTEGER NOT NULL DEFAULT 0,
    asked_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    answered_at REAL,
    error_code TEXT,
    message TEXT,
    answer TEXT
);
CREATE INDEX open_demands ON demands (kind, model_id) WHERE answered_at IS NULL;

-- M: what the queue of a waiting model looks like to a person
CREATE TABLE waits (
    model_id TEXT PRIMARY KEY,
    reason TEXT NOT NULL,
    since REAL NOT NULL
);

-- W: one row per worker and server; in_flight is 0 or 1 (counts live in the worker's memory)
CREATE TABLE leases (
    worker_id TEXT NOT NULL,
    server_id INTEGER NOT NULL,
    in_flight INTEGER NOT NULL,
    taken_at REAL NOT NULL,
    last_used_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    PRIMARY KEY (worker_id, server_id)
);

-- M: what happened and why
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    model_id TEXT,
    server_id INTEGER,
    gpu_uuid TEXT,
    message TEXT NOT NULL,
    data TEXT
);
CREATE INDEX events_by_time ON events (at);

-- M: the catalogue with what is known of each model
CREATE TABLE models (
    id TEXT PRIMARY KEY,
    path TEXT,
    problem TEXT,
    architecture TEXT,
    parameters INTEGER,
    quantization TEXT,
    file_bytes INTEGER,
    trained_context INTEGER,
    context_size INTEGER,
    estimated_bytes INTEGER,
    host_estimated_bytes INTEGER,
    confident INTEGER,
    updated_at REAL NOT NULL
);

-- M: GGUF headers read once
CREATE TABLE files (
    path TEXT PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    read_at REAL NOT NULL
);

-- M: estimated against measured, one row per load and device; written before the load with what
-- is expected of it, filled when it is there
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    model_id TEXT NOT NULL,
    -- NULL: told by llama-fit-params, no server ran
    server_id INTEGER,
    build TEXT NOT NULL,
    -- what the file is; that, build and settings; all that and the layout
    file_key TEXT NOT NULL,
    options_key TEXT NOT NULL,
    settings_key TEXT NOT NULL,
    -- tensor_split, gpu_layers, context_size, cpu_moe_layers, as JSON
    layout TEXT NOT NULL,
    -- a GPU's uuid, or 'host'
    device TEXT NOT NULL,
    -- place in the tensor split; -1 = the host
    device_index INTEGER NOT NULL,
    -- llama.cpp's buffers by the rules alone
    predicted_bytes INTEGER NOT NULL,
    -- what was promised: corrected by earlier measurements, overhead included
    estimated_bytes INTEGER NOT NULL,
    -- the part of it that was assumed for the backend
    overhead_bytes INTEGER NOT NULL,
    -- the server's own buffer lines
    buffers_bytes INTEGER,
    -- the most that NVML showed for its pid; for the host, resident memory
    process_bytes INTEGER,
    UNIQUE (server_id, device)
);
CREATE INDEX measurements_by_file ON measurements (file_key, build);

-- M: what a server takes of a GPU beside its buffers: the most that was measured
CREATE TABLE overheads (
    gpu_uuid TEXT NOT NULL,
    build TEXT NOT NULL,
    overhead_bytes INTEGER NOT NULL,
    -- measured after prompts, which make pools grow
    warm INTEGER NOT NULL,
    updated_at REAL NOT NULL,
    PRIMARY KEY (gpu_uuid, build)
);

-- M: what /metrics counts up, kept over restarts and when servers' rows are pruned
CREATE TABLE counts (
    -- loads (label: ready, or the error's code), evictions, tokens (prompt, predicted)
    name TEXT NOT NULL,
    model_id TEXT NOT NULL DEFAULT '',
    label TEXT NOT NULL DEFAULT '',
    value REAL NOT NULL,
    PRIMARY KEY (name, model_id, label)
) WITHOUT ROWID;

-- W: every worker adds what it answered since it last did; '' where no model was found
CREATE TABLE request_counts (
    model_id TEXT NOT NULL,
    -- HTTP status; nginx: it carries the bytes, and knows
    code TEXT NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (model_id, code)
) WITHOUT ROWID;

-- M: how much each model was used lately (decaying counts), and up to which totals that counts
CREATE TABLE uses (
    model_id TEXT PRIMARY KEY,
    requests REAL NOT NULL,
    tokens REAL NOT NULL,
    counted_at REAL NOT NULL,
    total_requests REAL NOT NULL,
    total_tokens REAL NOT NULL
) WITHOUT ROWID;

-- triggers, so that no way a load can end is forgotten
CREATE TRIGGER count_loads AFTER UPDATE OF state ON servers
WHEN OLD.state = 'starting' AND NEW.state IN ('ready', 'failed')
BEGIN
    INSERT INTO counts (name, model_id, label, value)
    VALUES ('loads', NEW.model_id,
            iif(NEW.state = 'ready', 'ready', coalesce(NEW.error_code, 'failed')), 1)
    ON CONFLICT DO UPDATE SET value = value + 1;
END;

-- a server's own counters start at 0 with every process
CREATE TRIGGER count_tokens AFTER UPDATE OF predicted_tokens_total, prompt_tokens_total
ON servers WHEN NEW.predicted_tokens_total IS NOT NULL
BEGIN
    INSERT INTO counts (name, model_id, label, value)
    VALUES ('tokens', NEW.model_id, 'predicted',
            max(0, NEW.predicted_tokens_total - coalesce(OLD.predicted_tokens_total, 0))),
           ('tokens', NEW.model_id, 'prompt',
            max(0, NEW.prompt_tokens_total - coalesce(OLD.prompt_tokens_total, 0)))
    ON CONFLICT DO UPDATE SET value = value + excluded.value;
END;

CREATE VIEW loads AS
SELECT d.model_id AS model, count(*) AS requests,
       round((julianday('now') - 2440587.5) * 86400.0 - min(d.asked_at), 1) AS waiting_s,
       coalesce(s.state, 'unloaded') AS state,
       w.reason AS waits_for
FROM demands d
LEFT JOIN servers s ON s.model_id = d.model_id
     AND s.state IN ('starting', 'ready', 'draining', 'stopping')
LEFT JOIN waits w ON w.model_id = d.model_id
WHERE d.kind = 'load' AND d.answered_at IS NULL
GROUP BY d.model_id;

CREATE VIEW running AS
SELECT s.id, s.model_id AS model, s.state, s.pid, s.port,
       coalesce((SELECT group_concat(a.gpu_index, ',') FROM assignments a
                 WHERE a.server_id = s.id), 'cpu') AS gpus,
       round(s.estimated_bytes / 1073741824.0, 2) AS estimated_gb,
       round(s.measured_bytes / 1073741824.0, 2) AS measured_gb,
       s.context_size, round(s.load_s, 2) AS load_s,
       (SELECT coalesce(sum(l.in_flight), 0) FROM leases l WHERE l.server_id = s.id) AS leased,
       round((julianday('now') - 2440587.5) * 86400.0 - s.last_used_at, 1) AS idle_s,
       s.reason
FROM servers s
WHERE s.state IN ('starting', 'ready', 'draining', 'stopping');

CREATE VIEW log AS
SELECT id, strftime('%Y-%m-%d %H:%M:%f', at, 'unixepoch', 'localtime') AS time, kind,
       model_id AS model, server_id AS server, message
FROM events;

CREATE VIEW accuracy AS
SELECT datetime(at, 'unixepoch', 'localtime') AS time, model_id AS model, server_id AS server,
       coalesce('gpu ' || (SELECT gpu_index FROM gpus WHERE uuid = device), device) AS device,
       round(estimated_bytes / 1048576.0, 1) AS estimated_mb,
       round((CASE device WHEN 'host' THEN buffers_bytes
                          ELSE coalesce(process_bytes, buffers_bytes + overhead_bytes) END)
             / 1048576.0, 1) AS measured_mb,
       round(predicted_bytes / 1048576.0, 2) AS predicted_buffers_mb,
       round(buffers_bytes / 1048576.0, 2) AS buffers_mb,
       round((process_bytes - buffers_bytes) / 1048576.0, 1) AS overhead_mb
FROM measurements WHERE buffers_bytes IS NOT NULL OR process_bytes IS NOT NULL
ORDER BY id;
