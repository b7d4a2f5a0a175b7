BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE artefacts (
	run BIGINT NOT NULL, 
	path TEXT NOT NULL, 
	bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64), 
	PRIMARY KEY (run, path), 
	FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "artefacts" VALUES(7990098751453485252,'metrics.jsonl',110,'818baa0869034d23cf1f16e4e35bc29b81c8b4f5152fda10b0a641be3034058a');
INSERT INTO "artefacts" VALUES(7990098751453485252,'result.json',779,'56e61a4489b72cef87fccc2dfee5a8502a908edfa53c909be5b17fb01a27f310');
INSERT INTO "artefacts" VALUES(635786739828547231,'evidence.jsonl',102,'7de02f645f011bfd034ddd21c6b88b185231008be558a34085437c98edebdfc8');
INSERT INTO "artefacts" VALUES(635786739828547231,'items/30-deployment.parquet',2176,'adb444a566a788aa8fab0dcb6fbf405aa53c5cf8212036aefc089217fe00c8ba');
INSERT INTO "artefacts" VALUES(635786739828547231,'metrics.jsonl',156,'5c9ac4088e450ffcff696f4d7eb9a512ebbe4e7e5dc595f40a55c584d01d8f89');
INSERT INTO "artefacts" VALUES(635786739828547231,'result.json',1108,'3d6ac686d6edcaac7eff89bdc6e26f62c588b85118bc6469db254aa1ce5cf513');
INSERT INTO "artefacts" VALUES(635786739828547231,'sites.json',48,'255ff68cb7f9dca6e588cd91364d3f397484475dfba7b1d0fba90f9dffac1ec4');
INSERT INTO "artefacts" VALUES(635786739828547231,'spec.yaml',237,'1f224eef92da26dc2706a40fe7951b38afcb241eb476cb7e9df9df78e362390e');
INSERT INTO "artefacts" VALUES(3298525810407691903,'evidence.jsonl',102,'7de02f645f011bfd034ddd21c6b88b185231008be558a34085437c98edebdfc8');
INSERT INTO "artefacts" VALUES(3298525810407691903,'items/30-deployment.parquet',2176,'e92ba5c3ed6a974005104669a70a001fe37440d8adc9d8fc70ecf18087a8e0de');
INSERT INTO "artefacts" VALUES(3298525810407691903,'metrics.jsonl',174,'8efa36aba1e27da510178c2fb2fa168cf6c99cf8e78cd6551c6d6f020eb274e0');
INSERT INTO "artefacts" VALUES(3298525810407691903,'result.json',1108,'e778b2c4b87e548404b86b7c24221516a92e4603801cb1826c63e69c36337cd8');
INSERT INTO "artefacts" VALUES(3298525810407691903,'sites.json',48,'255ff68cb7f9dca6e588cd91364d3f397484475dfba7b1d0fba90f9dffac1ec4');
INSERT INTO "artefacts" VALUES(3298525810407691903,'spec.yaml',237,'7efe474790a636da533016f4ffa85ce2d64f434c432828c725006c84fad88267');
CREATE TABLE evaluations (
	run BIGINT NOT NULL, 
	step INTEGER NOT NULL, 
	profile TEXT NOT NULL, 
	last BOOLEAN NOT NULL, 
	n INTEGER, 
	strict DOUBLE, 
	flexible DOUBLE, 
	formatted DOUBLE, 
	mean_length DOUBLE, 
	conditions JSON NOT NULL, 
	PRIMARY KEY (run, step, profile), 
	FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "evaluations" VALUES(7990098751453485252,1,'val-test_score-gsm8k',0,NULL,0.25,NULL,NULL,NULL,'{"name": "val-test_score-gsm8k", "scorer": "val/test_score/gsm8k"}');
INSERT INTO "evaluations" VALUES(7990098751453485252,2,'val-test_score-gsm8k',1,NULL,0.5,NULL,NULL,NULL,'{"name": "val-test_score-gsm8k", "scorer": "val/test_score/gsm8k"}');
INSERT INTO "evaluations" VALUES(635786739828547231,0,'deployment',0,40,0.3,0.5,1.0,20.0,'{"name": "deployment", "precision": "w4a4", "sites_digest": "aaaa", "noise": "off", "scorer": "strict-1", "max_new_tokens": 48, "sampling": "greedy", "items_digest": "pppp"}');
INSERT INTO "evaluations" VALUES(635786739828547231,30,'deployment',1,40,0.5,0.5,1.0,20.0,'{"name": "deployment", "precision": "w4a4", "sites_digest": "aaaa", "noise": "off", "scorer": "strict-1", "max_new_tokens": 48, "sampling": "greedy", "items_digest": "pppp"}');
INSERT INTO "evaluations" VALUES(3298525810407691903,0,'deployment',0,40,0.3,1.0,1.0,20.0,'{"name": "deployment", "precision": "w4a4", "sites_digest": "aaaa", "noise": "off", "scorer": "strict-1", "max_new_tokens": 48, "sampling": "greedy", "items_digest": "pppp"}');
INSERT INTO "evaluations" VALUES(3298525810407691903,30,'deployment',1,40,1.0,1.0,1.0,20.0,'{"name": "deployment", "precision": "w4a4", "sites_digest": "aaaa", "noise": "off", "scorer": "strict-1", "max_new_tokens": 48, "sampling": "greedy", "items_digest": "pppp"}');
CREATE TABLE evidence (
	run BIGINT NOT NULL, 
	line INTEGER NOT NULL, 
	kind TEXT NOT NULL, 
	phase TEXT, 
	step INTEGER, 
	content JSON NOT NULL, 
	PRIMARY KEY (run, line), 
	FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "evidence" VALUES(635786739828547231,0,'master',NULL,30,'{"kind": "master", "step": 30, "unharmed": true}');
INSERT INTO "evidence" VALUES(635786739828547231,1,'live_equals_fresh',NULL,NULL,'{"kind": "live_equals_fresh", "max_difference": 0.0}');
INSERT INTO "evidence" VALUES(3298525810407691903,0,'master',NULL,30,'{"kind": "master", "step": 30, "unharmed": true}');
INSERT INTO "evidence" VALUES(3298525810407691903,1,'live_equals_fresh',NULL,NULL,'{"kind": "live_equals_fresh", "max_difference": 0.0}');
CREATE TABLE experiments (
	digest VARCHAR(12) NOT NULL, 
	task VARCHAR(12) NOT NULL, 
	model VARCHAR(12) NOT NULL, 
	spec JSON NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "experiments" VALUES('e3fb2a22f638','54d7c9b12dc2','c08d8e44343f','{"model": {"embedded": {"hidden_size": 64}, "dtype": "float32"}, "task": {"name": "arithmetic", "difficulty": 2}, "training": {"algorithm": "dapo", "steps": 30, "lr": 0.0004}, "injection": null, "noise": null, "evaluation": {"count": 40, "profiles": ["deployment"]}}');
CREATE TABLE items (
	run BIGINT NOT NULL, 
	step INTEGER NOT NULL, 
	profile TEXT NOT NULL, 
	problems VARCHAR(64) NOT NULL, 
	strict BLOB NOT NULL, 
	flexible BLOB NOT NULL, 
	formatted BLOB NOT NULL, 
	truncated BLOB NOT NULL, 
	lengths BLOB NOT NULL, 
	PRIMARY KEY (run, step, profile), 
	FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE, 
	FOREIGN KEY(problems) REFERENCES problem_lists (digest)
);
INSERT INTO "items" VALUES(635786739828547231,30,'deployment','5ccd5547f8d0227ddb6efd8803d405db1fc075c6ca25ef0ecb0e488cdff6f968',X'AA',X'FF',X'FF',X'00',X'789C63646060600262662066016256206603627620E600620002000025');
INSERT INTO "items" VALUES(3298525810407691903,30,'deployment','5ccd5547f8d0227ddb6efd8803d405db1fc075c6ca25ef0ecb0e488cdff6f968',X'FF',X'FF',X'FF',X'00',X'789C63646060600262662066016256206603627620E600620002000025');
CREATE TABLE metrics (
	run BIGINT NOT NULL, 
	step INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	value DOUBLE, 
	PRIMARY KEY (run, step, name), 
	FOREIGN KEY(run) REFERENCES runs (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "metrics" VALUES(635786739828547231,0,'grad_norm',NULL);
INSERT INTO "metrics" VALUES(635786739828547231,0,'reward/mean',0.0);
INSERT INTO "metrics" VALUES(635786739828547231,1,'grad_norm',NULL);
INSERT INTO "metrics" VALUES(635786739828547231,1,'reward/mean',0.1);
INSERT INTO "metrics" VALUES(635786739828547231,2,'grad_norm',NULL);
INSERT INTO "metrics" VALUES(635786739828547231,2,'reward/mean',0.2);
INSERT INTO "metrics" VALUES(3298525810407691903,0,'grad_norm',NULL);
INSERT INTO "metrics" VALUES(3298525810407691903,0,'reward/mean',0.01);
INSERT INTO "metrics" VALUES(3298525810407691903,1,'grad_norm',NULL);
INSERT INTO "metrics" VALUES(3298525810407691903,1,'reward/mean',0.11);
INSERT INTO "metrics" VALUES(3298525810407691903,2,'grad_norm',NULL);
INSERT INTO "metrics" VALUES(3298525810407691903,2,'reward/mean',2.10000000000000019984e-01);
INSERT INTO "metrics" VALUES(7990098751453485252,1,'loss',0.5);
INSERT INTO "metrics" VALUES(7990098751453485252,1,'val/test_score/gsm8k',0.25);
INSERT INTO "metrics" VALUES(7990098751453485252,2,'loss',0.25);
INSERT INTO "metrics" VALUES(7990098751453485252,2,'val/test_score/gsm8k',0.5);
CREATE TABLE problem_lists (
	digest VARCHAR(64) NOT NULL, 
	rows INTEGER NOT NULL, 
	packed BLOB NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "problem_lists" VALUES('5ccd5547f8d0227ddb6efd8803d405db1fc075c6ca25ef0ecb0e488cdff6f968',8,X'78DA8B8E562A300002251D306D08A58DA0B431943681D2A650DA0C4A9B2BC5EA441BE8A0C0D858000CDA11F9');
CREATE TABLE runs (
	id BIGINT NOT NULL, 
	suite TEXT NOT NULL, 
	run_id TEXT NOT NULL, 
	arm TEXT NOT NULL, 
	seed INTEGER, 
	experiment VARCHAR(12), 
	spec_digest TEXT, 
	code_digest TEXT, 
	sites_digest TEXT, 
	steps_asked INTEGER, 
	steps_done INTEGER, 
	wall_s DOUBLE, 
	versions JSON NOT NULL, 
	evidence JSON NOT NULL, 
	imported JSON, 
	content VARCHAR(64) NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT uq_runs_suite_run_id UNIQUE (suite, run_id), 
	FOREIGN KEY(experiment) REFERENCES experiments (digest)
);
INSERT INTO "runs" VALUES(7990098751453485252,'imported','verl-s3-3a30fa48ac3c','verl',3,NULL,NULL,NULL,NULL,NULL,2,NULL,'{}','{}','{"dialect": "json", "source": "train.jsonl", "sha256": "3a30fa48ac3c5b244528d80f85f712b4b96dc33982d2c6bb9bec5c0bbfd90e61", "config": {"lr": 1e-06}, "status": "failed", "note": "out of memory", "went_back": 0, "met_twice": 0, "left_behind": 0, "skipped": 0}','56e61a4489b72cef87fccc2dfee5a8502a908edfa53c909be5b17fb01a27f310');
INSERT INTO "runs" VALUES(635786739828547231,'trial','bf16-s0-96a0375dfeac','bf16',0,'e3fb2a22f638','96a0375dfeac','cccc','aaaa',30,30,12.5,'{"torch": "2.13"}','{"sites": 14, "calls": {"training": 420, "rollout": 900}, "noise": {}, "master_unharmed": true}',NULL,'3d6ac686d6edcaac7eff89bdc6e26f62c588b85118bc6469db254aa1ce5cf513');
INSERT INTO "runs" VALUES(3298525810407691903,'trial','bf16-s1-f362953faa58','bf16',1,'e3fb2a22f638','f362953faa58','cccc','aaaa',30,30,12.5,'{"torch": "2.13"}','{"sites": 14, "calls": {"training": 420, "rollout": 900}, "noise": {}, "master_unharmed": true}',NULL,'e778b2c4b87e548404b86b7c24221516a92e4603801cb1826c63e69c36337cd8');
CREATE INDEX ix_runs_suite_arm ON runs (suite, arm);
CREATE INDEX ix_runs_experiment ON runs (experiment);
COMMIT;
