"""First tables: access, workflows, executions and their journal.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

IDENTIFIER = sa.String().with_variant(sa.String(collation="C"), "postgresql")
"""Comparison byte by byte, as ids need it; several times faster than that of a language."""


def upgrade() -> None:
    """Create all tables and indexes of release 0.1.0, and tune those on PostgreSQL."""
    _create_schema_support()
    _create_access()
    _create_workflows()
    _create_runs()
    _create_data_sources()
    for field in ("created_at", "updated_at", "name", "status", "version"):
        op.create_index(
            f"ix_workflow_listed_by_{field}",
            "workflow",
            ["organization_id", field, "id", "owner_id", "is_public"],
            unique=False,
            postgresql_where=sa.text("deleted_at IS NULL AND is_template IS false"),
            sqlite_where=sa.text("deleted_at IS NULL AND is_template IS 0"),
        )

    _create_audit_trail()
    _create_deployments()
    _create_intake()
    if op.get_bind().dialect.name == "postgresql":
        _tune_postgresql()


def _create_schema_support() -> None:
    table = op.create_table(
        "schema_support",
        sa.Column("oldest_revision", IDENTIFIER, nullable=False),
        sa.PrimaryKeyConstraint("oldest_revision"),
    )
    op.bulk_insert(table, [{"oldest_revision": revision}])


def _create_access() -> None:
    """Create organizations, users and their keys."""
    op.create_table(
        "organization",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "user_account",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("email", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organization.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("organization_id", "email", name="uq_user_account_email"),
    )
    op.create_table(
        "api_key",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("secret_id", IDENTIFIER, nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organization.id"],
        ),
        sa.ForeignKeyConstraint(
            ["user_id"],
            ["user_account.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hash", name="uq_api_key_hash"),
    )
    op.create_index("ix_api_key_user", "api_key", ["user_id"], unique=False)
    op.create_index("ix_api_key_secret", "api_key", ["secret_id"], unique=False)


def _create_workflows() -> None:
    """Create workflows, their shares and their versions."""
    op.create_table(
        "workflow",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("owner_id", IDENTIFIER, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("app_id", IDENTIFIER, nullable=True),
        sa.Column("search_text", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("lifecycle", sa.Text(), nullable=True),
        sa.Column("is_public", sa.Boolean(), nullable=False),
        sa.Column("is_template", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("deleted_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organization.id"],
        ),
        sa.ForeignKeyConstraint(
            ["owner_id"],
            ["user_account.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_workflow_template",
        "workflow",
        ["organization_id", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("deleted_at IS NULL AND is_template IS true"),
        sqlite_where=sa.text("deleted_at IS NULL AND is_template IS 1"),
    )
    op.create_index(
        "ix_workflow_app",
        "workflow",
        ["organization_id", "app_id"],
        unique=False,
        postgresql_where=sa.text("app_id IS NOT NULL"),
        sqlite_where=sa.text("app_id IS NOT NULL"),
    )
    op.create_table(
        "workflow_graph",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("nodes", sa.Text(), nullable=False),
        sa.Column("connections", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("workflow_id"),
    )
    op.create_table(
        "workflow_share",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("shared_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"],
            ["user_account.id"],
        ),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("workflow_id", "user_id"),
    )
    op.create_index("ix_workflow_share_user", "workflow_share", ["user_id"], unique=False)
    op.create_table(
        "workflow_tag",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("tag", sa.String(), nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("organization_id", "tag", "workflow_id"),
    )
    op.create_table(
        "workflow_trigger",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("workflow_id", "node_id"),
    )
    op.create_table(
        "workflow_trigger_match",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("pattern", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("workflow_id", "node_id", "pattern"),
    )
    op.create_index(
        "ix_workflow_trigger_match_pattern",
        "workflow_trigger_match",
        ["organization_id", "pattern"],
        unique=False,
    )
    op.create_table(
        "schedule",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("timing_hash", sa.String(), nullable=False),
        sa.Column("anchor_at", sa.BigInteger(), nullable=False),
        sa.Column("planned_at", sa.BigInteger(), nullable=False),
        sa.Column("next_run_at", sa.BigInteger(), nullable=True),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("last_run_at", sa.BigInteger(), nullable=True),
        sa.Column("last_execution_id", IDENTIFIER, nullable=True),
        sa.Column("passed_at", sa.BigInteger(), nullable=True),
        sa.Column("passed_reason", sa.String(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("workflow_id"),
    )
    op.create_index(
        "ix_schedule_due",
        "schedule",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_table(
        "workflow_version",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("version_tag", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False),
        sa.Column("created_by", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("workflow_id", "version"),
        sa.UniqueConstraint("workflow_id", "version_tag", name="uq_workflow_version_tag"),
    )


def _create_runs() -> None:
    """Create executions, their records, and the tables by which processes coordinate."""
    op.create_table(
        "definition",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "hash"),
    )
    op.create_table(
        "execution",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("target", IDENTIFIER, nullable=False),
        sa.Column("home", IDENTIFIER, nullable=True),
        sa.Column("trigger_type", sa.String(), nullable=False),
        sa.Column("definition_hash", IDENTIFIER, nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("turn", sa.SmallInteger(), nullable=False),
        sa.Column("is_fresh", sa.Boolean(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("on_trial", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column("trial_losses", sa.SmallInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("lease_owner", IDENTIFIER, nullable=True),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("timeout_microseconds", sa.BigInteger(), nullable=False),
        sa.Column("deadline_at", sa.BigInteger(), nullable=True),
        sa.Column("request", sa.String(), nullable=True),
        sa.Column("completed_nodes", sa.Integer(), nullable=False),
        sa.Column("total_nodes", sa.Integer(), nullable=False),
        sa.Column("progress", sa.SmallInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("key_id", IDENTIFIER, nullable=False),
        sa.Column("resumed_from", IDENTIFIER, nullable=True),
        sa.Column("inbox", IDENTIFIER, nullable=False),
        sa.Column("parent_id", IDENTIFIER, nullable=True),
        sa.Column("root_id", IDENTIFIER, nullable=True),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.Column("signals", sa.Integer(), nullable=False),
        sa.Column("concurrency_key", IDENTIFIER, nullable=True),
        sa.Column("concurrency_limit", sa.Integer(), nullable=True),
        sa.Column("follow_up", sa.Text(), nullable=True),
        sa.Column("follow_up_at", sa.BigInteger(), nullable=True),
        sa.Column("follow_up_outcome", sa.Text(), nullable=True),
        sa.Column("is_private", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("has_journal", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_execution_pending",
        "execution",
        ["target", "organization_id", "turn", "is_fresh", "rank"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
        sqlite_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "ix_execution_running",
        "execution",
        ["workflow_id"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
        sqlite_where=sa.text("status = 'running'"),
    )
    op.create_index(
        "ix_execution_failed",
        "execution",
        ["workflow_id", "ended_at"],
        unique=False,
        postgresql_where=sa.text("status = 'failed'"),
        sqlite_where=sa.text("status = 'failed'"),
    )
    op.create_index(
        "ix_execution_waiting",
        "execution",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("status = 'waiting'"),
        sqlite_where=sa.text("status = 'waiting'"),
    )
    op.create_index(
        "ix_execution_deferred",
        "execution",
        ["target", "organization_id", "workflow_id"],
        unique=False,
        postgresql_where=sa.text("status = 'waiting' AND started_at IS NULL"),
        sqlite_where=sa.text("status = 'waiting' AND started_at IS NULL"),
    )
    op.create_index(
        "ix_execution_children",
        "execution",
        ["parent_id"],
        unique=False,
        postgresql_where=sa.text("parent_id IS NOT NULL AND ended_at IS NULL"),
        sqlite_where=sa.text("parent_id IS NOT NULL AND ended_at IS NULL"),
    )
    op.create_index(
        "ix_execution_root",
        "execution",
        ["root_id"],
        unique=False,
        postgresql_where=sa.text("root_id IS NOT NULL"),
        sqlite_where=sa.text("root_id IS NOT NULL"),
    )
    op.create_index(
        "ix_execution_resumed",
        "execution",
        ["key_id"],
        unique=False,
        postgresql_where=sa.text("resumed_from IS NOT NULL"),
        sqlite_where=sa.text("resumed_from IS NOT NULL"),
    )
    op.create_index(
        "ix_execution_limited",
        "execution",
        ["concurrency_key", "is_fresh", "rank"],
        unique=False,
        postgresql_where=sa.text("target = 'limited' AND status = 'pending'"),
        sqlite_where=sa.text("target = 'limited' AND status = 'pending'"),
    )
    op.create_index(
        "ix_execution_admitted",
        "execution",
        ["concurrency_key"],
        unique=False,
        postgresql_where=sa.text("concurrency_key IS NOT NULL AND target <> 'limited' AND ended_at IS NULL"),
        sqlite_where=sa.text("concurrency_key IS NOT NULL AND target <> 'limited' AND ended_at IS NULL"),
    )
    op.create_index(
        "ix_execution_follow_up",
        "execution",
        ["follow_up_at", "ended_at"],
        unique=False,
        postgresql_where=sa.text("follow_up IS NOT NULL AND ended_at IS NOT NULL"),
        sqlite_where=sa.text("follow_up IS NOT NULL AND ended_at IS NOT NULL"),
    )
    op.create_index(
        "ix_execution_deployed",
        "execution",
        ["target", "ended_at"],
        unique=False,
        postgresql_where=sa.text("target <> 'shared' AND target <> 'limited' AND ended_at IS NOT NULL"),
        sqlite_where=sa.text("target <> 'shared' AND target <> 'limited' AND ended_at IS NOT NULL"),
    )
    op.create_table(
        "execution_data",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("trigger", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id"),
    )
    op.create_index(
        "ix_execution_data_organization", "execution_data", ["organization_id", "created_at"], unique=False
    )
    op.create_index(
        "ix_execution_data_workflow", "execution_data", ["workflow_id", "created_at"], unique=False
    )
    op.create_table(
        "idempotency",
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("scope", IDENTIFIER, nullable=False),
        sa.Column("key", IDENTIFIER, nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("resource_id", IDENTIFIER, nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("lane", "scope", "key"),
    )
    op.create_index(op.f("ix_idempotency_expires_at"), "idempotency", ["expires_at"], unique=False)
    op.create_table(
        "leadership",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "log_line",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id", "sequence"),
    )
    op.create_table(
        "pace",
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("key", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("next_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "key"),
    )
    op.create_index(op.f("ix_pace_next_at"), "pace", ["next_at"], unique=False)
    op.create_table(
        "signal",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration"),
    )
    op.create_table(
        "span",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("port", sa.String(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("wake_at", sa.BigInteger(), nullable=True),
        sa.Column("input_node", IDENTIFIER, nullable=True),
        sa.Column("input", sa.Text(), nullable=True),
        sa.Column("output", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("unresolved", sa.Text(), nullable=True),
        sa.Column("awaits", sa.Text(), nullable=True),
        sa.Column("resolved_config", sa.Text(), nullable=True),
        sa.Column("hashes", sa.LargeBinary(), nullable=True),
        sa.Column("input_blob", sa.Text(), nullable=True),
        sa.Column("output_blob", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration"),
    )
    op.create_table(
        "attempt_span",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("next_attempt_at", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration", "attempt"),
    )


def _create_data_sources() -> None:
    """Create data sources and signing secrets."""
    op.create_table(
        "signing_secret",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("secret_id", IDENTIFIER, nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organization.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_signing_secret_organization", "signing_secret", ["organization_id"], unique=False)
    op.create_index("ix_signing_secret_secret", "signing_secret", ["secret_id"], unique=False)
    op.create_table(
        "data_source",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("owner_id", IDENTIFIER, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("secret_names", sa.Text(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("secret_id", IDENTIFIER, nullable=False),
        sa.Column("secrets_set_at", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("is_public", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organization.id"],
        ),
        sa.ForeignKeyConstraint(
            ["owner_id"],
            ["user_account.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("owner_id", "name", name="uq_data_source_name"),
    )
    op.create_index(
        "ix_data_source_organization", "data_source", ["organization_id", "created_at", "id"], unique=False
    )
    op.create_index("ix_data_source_secret", "data_source", ["secret_id"], unique=False)
    op.create_table(
        "data_source_share",
        sa.Column("data_source_id", IDENTIFIER, nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("shared_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["data_source_id"],
            ["data_source.id"],
        ),
        sa.ForeignKeyConstraint(
            ["user_id"],
            ["user_account.id"],
        ),
        sa.PrimaryKeyConstraint("data_source_id", "user_id"),
    )
    op.create_index("ix_data_source_share_user", "data_source_share", ["user_id"], unique=False)


def _create_audit_trail() -> None:
    op.create_table(
        "audit_entry",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("key_id", IDENTIFIER, nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", IDENTIFIER, nullable=False),
        sa.Column("before_hash", sa.String(), nullable=True),
        sa.Column("after_hash", sa.String(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organization.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_audit_entry_organization", "audit_entry", ["organization_id", "created_at"], unique=False
    )
    op.create_index(
        "ix_audit_entry_object", "audit_entry", ["organization_id", "object_id", "created_at"], unique=False
    )


def _create_deployments() -> None:
    op.create_table(
        "deployment",
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("is_deployed", sa.Boolean(), nullable=False),
        sa.Column("replicas", sa.Integer(), nullable=False),
        sa.Column("last_replicas", sa.Integer(), nullable=False),
        sa.Column("definition_hash", IDENTIFIER, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("deployed_generation", sa.BigInteger(), nullable=False),
        sa.Column("drain_until", sa.BigInteger(), nullable=True),
        sa.Column("stopped_reason", sa.String(), nullable=True),
        sa.Column("stopped_at", sa.BigInteger(), nullable=True),
        sa.Column("started_by_hand_at", sa.BigInteger(), nullable=True),
        sa.Column("last_activity_at", sa.BigInteger(), nullable=True),
        sa.Column("observed", sa.String(), nullable=False),
        sa.Column("observed_replicas", sa.Integer(), nullable=False),
        sa.Column("ready_replicas", sa.Integer(), nullable=False),
        sa.Column("ready_addresses", sa.Text(), nullable=False),
        sa.Column("observed_definition_hash", IDENTIFIER, nullable=True),
        sa.Column("observed_generation", sa.BigInteger(), nullable=False),
        sa.Column("observed_reason", sa.String(), nullable=True),
        sa.Column("observed_reason_code", sa.String(), nullable=True),
        sa.Column("failed_reason", sa.String(), nullable=True),
        sa.Column("failed_reason_code", sa.String(), nullable=True),
        sa.Column("start_failures", sa.Integer(), nullable=False),
        sa.Column("observed_at", sa.BigInteger(), nullable=True),
        sa.Column("held_by", IDENTIFIER, nullable=True),
        sa.Column("held_until", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("workflow_id"),
    )
    op.create_table(
        "lifecycle_decision",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("stopped_reason", sa.String(), nullable=True),
        sa.Column("replicas", sa.Integer(), nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=True),
        sa.Column("inputs", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_lifecycle_decision_workflow", "lifecycle_decision", ["workflow_id", "at", "id"], unique=False
    )
    op.create_table(
        "deployment_token",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["workflow_id"],
            ["workflow.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hash", name="uq_deployment_token_hash"),
    )
    op.create_index("ix_deployment_token_workflow", "deployment_token", ["workflow_id"], unique=False)


def _create_intake() -> None:
    """Create deliveries, events and sender tokens."""
    op.create_table(
        "delivery",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=True),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("sender", sa.String(), nullable=False),
        sa.Column("content_hash", IDENTIFIER, nullable=False),
        sa.Column("content_bytes", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("execution_id", IDENTIFIER, nullable=True),
        sa.Column("event_id", IDENTIFIER, nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("payload", sa.Text(), nullable=True),
        sa.Column("derived_key", sa.Text(), nullable=True),
        sa.Column("redriven_from", IDENTIFIER, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_delivery_workflow", "delivery", ["workflow_id", "created_at"], unique=False)
    op.create_index("ix_delivery_organization", "delivery", ["organization_id", "created_at"], unique=False)
    op.create_index(
        "ix_delivery_execution",
        "delivery",
        ["execution_id"],
        unique=False,
        postgresql_where=sa.text("execution_id IS NOT NULL"),
        sqlite_where=sa.text("execution_id IS NOT NULL"),
    )
    op.create_table(
        "event",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("event_type", IDENTIFIER, nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("told_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_event_organization", "event", ["organization_id", "created_at"], unique=False)
    op.create_index("ix_event_type", "event", ["organization_id", "event_type", "created_at"], unique=False)
    op.create_index(
        "ix_event_untold",
        "event",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("told_at IS NULL"),
        sqlite_where=sa.text("told_at IS NULL"),
    )
    op.create_table(
        "event_wait",
        sa.Column("execution_id", IDENTIFIER, nullable=False),
        sa.Column("node_id", IDENTIFIER, nullable=False),
        sa.Column("iteration", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("pattern", IDENTIFIER, nullable=False),
        sa.Column("condition", sa.Text(), nullable=True),
        sa.Column("given", sa.Text(), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("execution_id", "node_id", "iteration"),
    )
    op.create_index("ix_event_wait_pattern", "event_wait", ["organization_id", "pattern"], unique=False)
    op.create_table(
        "intake_token",
        sa.Column("id", IDENTIFIER, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column("workflow_id", IDENTIFIER, nullable=True),
        sa.Column("user_id", IDENTIFIER, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("hash", IDENTIFIER, nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("providers", sa.String(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("secret_id", IDENTIFIER, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        sa.ForeignKeyConstraint(["workflow_id"], ["workflow.id"]),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hash", name="uq_intake_token_hash"),
    )
    op.create_index("ix_intake_token_organization", "intake_token", ["organization_id", "kind"], unique=False)
    op.create_index("ix_intake_token_workflow", "intake_token", ["workflow_id"], unique=False)
    op.create_index("ix_intake_token_secret", "intake_token", ["secret_id"], unique=False)
    op.create_table(
        "intake_sample",
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False),
        sa.Column("organization_id", IDENTIFIER, nullable=True),
        sa.Column("workflow_id", IDENTIFIER, nullable=True),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("content_bytes", sa.Integer(), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("route", "slot"),
    )


def _tune_postgresql() -> None:
    # Live rows change a few times within milliseconds: leave room for that on their page, and vacuum early.
    op.execute(
        "ALTER TABLE execution SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02,"
        " autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.02)"
    )
