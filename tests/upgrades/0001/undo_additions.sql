-- What revision 0001 got after release 0.1.0: without it, a database is as that release made it.
DROP TABLE attempt_span;
DROP TABLE schema_support;
ALTER TABLE execution DROP COLUMN on_trial;
ALTER TABLE execution DROP COLUMN trial_losses;
ALTER TABLE execution DROP COLUMN progress;
ALTER TABLE execution DROP COLUMN is_private;
ALTER TABLE deployment DROP COLUMN observed_reason_code;
ALTER TABLE deployment DROP COLUMN failed_reason;
ALTER TABLE deployment DROP COLUMN failed_reason_code;
ALTER TABLE deployment DROP COLUMN start_failures;
ALTER TABLE delivery DROP COLUMN derived_key;
