BEGIN TRANSACTION;
CREATE TABLE completions (
	id TEXT NOT NULL, 
	caller TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "completions" VALUES('c1','key-1','2026-01-02T03:04:05.000000Z','{"answers":["It is on its way."],"caller":"key-1","created_at":"2026-01-02T03:04:05Z","id":"c1","messages":[{"content":"Where is my lamp?","role":"user"}],"model":"policy","policy_version":2}');
CREATE TABLE exclusions (
	seq INTEGER NOT NULL, 
	what TEXT NOT NULL, 
	name TEXT NOT NULL, 
	out INTEGER NOT NULL, 
	reason TEXT NOT NULL, 
	"by" TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	PRIMARY KEY (seq)
);
INSERT INTO "exclusions" VALUES(1,'feedback','r2',1,'test click','kim','2026-11-28T11:30:12.708271+00:00');
INSERT INTO "exclusions" VALUES(2,'feedback','r2',0,'no, it was not','kim','2026-11-28T11:30:12.710247+00:00');
CREATE TABLE feedback (
	seq INTEGER NOT NULL, 
	id TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	prompt_id TEXT NOT NULL, 
	annotator TEXT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (seq), 
	UNIQUE (id)
);
INSERT INTO "feedback" VALUES(1,'r1','rating','p1','ann','{"annotator":"ann","answers":[{"completion_id":"c1","policy_version":2,"sampler":"policy","text":"It is on its way."}],"created_at":"2026-01-02T03:04:05.000000Z","group":"p1","id":"r1","messages":[{"content":"Where is my lamp?","role":"user"}],"prompt_id":"p1","rating":{"aspect":"overall","scale":"stars","value":4.0}}');
INSERT INTO "feedback" VALUES(2,'r2','ranking','p1','bea','{"annotator":"bea","answers":[{"completion_id":"c1","policy_version":2,"sampler":"policy","text":"It is on its way."},{"sampler":"policy","text":"No."}],"created_at":"2026-01-02T03:04:05.000000Z","display_order":[1,0],"group":"p1","id":"r2","messages":[{"content":"Where is my lamp?","role":"user"}],"prompt_id":"p1","ranking":{"ranks":[1,2]}}');
INSERT INTO "feedback" VALUES(3,'r3','comment','p1','bea','{"annotator":"bea","answers":[{"completion_id":"c1","policy_version":2,"sampler":"policy","text":"It is on its way."}],"comment":{"text":"Kind."},"created_at":"2026-01-02T03:04:05.000000Z","group":"p1","id":"r3","messages":[{"content":"Where is my lamp?","role":"user"}],"prompt_id":"p1"}');
CREATE TABLE request_keys (
	caller TEXT NOT NULL, 
	"key" TEXT NOT NULL, 
	request_sha256 TEXT NOT NULL, 
	answer TEXT NOT NULL, 
	PRIMARY KEY (caller, "key")
)
 WITHOUT ROWID

;
INSERT INTO "request_keys" VALUES('key-1','k1','abababababababababababababababababababababababababababababababab','{"id":"r1"}');
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(2);
INSERT INTO "schema_version" VALUES(3);
CREATE TABLE snapshot_rows (
	snapshot_id TEXT NOT NULL, 
	seq INTEGER NOT NULL, 
	PRIMARY KEY (snapshot_id, seq), 
	FOREIGN KEY(snapshot_id) REFERENCES snapshots (id), 
	FOREIGN KEY(seq) REFERENCES feedback (seq)
)
 WITHOUT ROWID

;
INSERT INTO "snapshot_rows" VALUES('first',1);
INSERT INTO "snapshot_rows" VALUES('first',2);
INSERT INTO "snapshot_rows" VALUES('first',3);
CREATE TABLE snapshots (
	id TEXT NOT NULL, 
	sha256 TEXT NOT NULL, 
	rows INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "snapshots" VALUES('first','1f2f7e97e6454e074d07cd64f67247e9feed5bb3f0279f35809e30788c4e4e4a',3);
CREATE INDEX feedback_by_annotator ON feedback (annotator);
CREATE INDEX feedback_by_prompt ON feedback (prompt_id);
CREATE TRIGGER feedback_no_update BEFORE UPDATE ON feedback BEGIN SELECT RAISE(ABORT, 'feedback is append-only'); END;
CREATE TRIGGER feedback_no_delete BEFORE DELETE ON feedback BEGIN SELECT RAISE(ABORT, 'feedback is append-only'); END;
CREATE TRIGGER feedback_no_replace BEFORE INSERT ON feedback WHEN EXISTS (SELECT 1 FROM feedback WHERE (seq = NEW.seq) OR id = NEW.id) BEGIN SELECT RAISE(ABORT, 'feedback is append-only'); END;
CREATE TRIGGER snapshots_no_update BEFORE UPDATE ON snapshots BEGIN SELECT RAISE(ABORT, 'snapshots is append-only'); END;
CREATE TRIGGER snapshots_no_delete BEFORE DELETE ON snapshots BEGIN SELECT RAISE(ABORT, 'snapshots is append-only'); END;
CREATE TRIGGER snapshots_no_replace BEFORE INSERT ON snapshots WHEN EXISTS (SELECT 1 FROM snapshots WHERE (id = NEW.id) OR id = NEW.id) BEGIN SELECT RAISE(ABORT, 'snapshots is append-only'); END;
CREATE INDEX completions_by_caller ON completions (caller);
CREATE INDEX completions_by_time ON completions (created_at);
CREATE TRIGGER request_keys_no_update BEFORE UPDATE ON request_keys BEGIN SELECT RAISE(ABORT, 'request_keys is append-only'); END;
CREATE TRIGGER request_keys_no_delete BEFORE DELETE ON request_keys BEGIN SELECT RAISE(ABORT, 'request_keys is append-only'); END;
CREATE TRIGGER request_keys_no_replace BEFORE INSERT ON request_keys WHEN EXISTS (SELECT 1 FROM request_keys WHERE (caller = NEW.caller AND key = NEW.key)) BEGIN SELECT RAISE(ABORT, 'request_keys is append-only'); END;
CREATE TRIGGER snapshot_rows_no_update BEFORE UPDATE ON snapshot_rows BEGIN SELECT RAISE(ABORT, 'snapshot_rows is append-only'); END;
CREATE TRIGGER snapshot_rows_no_delete BEFORE DELETE ON snapshot_rows BEGIN SELECT RAISE(ABORT, 'snapshot_rows is append-only'); END;
CREATE TRIGGER snapshot_rows_no_replace BEFORE INSERT ON snapshot_rows WHEN EXISTS (SELECT 1 FROM snapshot_rows WHERE (snapshot_id = NEW.snapshot_id AND seq = NEW.seq)) BEGIN SELECT RAISE(ABORT, 'snapshot_rows is append-only'); END;
CREATE TRIGGER exclusions_no_update BEFORE UPDATE ON exclusions BEGIN SELECT RAISE(ABORT, 'exclusions is append-only'); END;
CREATE TRIGGER exclusions_no_delete BEFORE DELETE ON exclusions BEGIN SELECT RAISE(ABORT, 'exclusions is append-only'); END;
CREATE TRIGGER exclusions_no_replace BEFORE INSERT ON exclusions WHEN EXISTS (SELECT 1 FROM exclusions WHERE (seq = NEW.seq)) BEGIN SELECT RAISE(ABORT, 'exclusions is append-only'); END;
COMMIT;
