"""Clients and servers that no ordinary program is: each verb does one thing and prints what it saw, a line per event.

Servers listen on both families and print `ready` when they do. Clients try the addresses that they are given and nothing else.
"""

import asyncio
import collections
import errno
import itertools
import socket
import struct
import sys
import threading
import time

# What follows a reset is no second kind of failure.
NAMES = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset", errno.ENOTCONN: "reset"}


def say(*words):
    print(*words, flush=True)


def listener(port, backlog=4096):
    server = socket.socket(socket.AF_INET6)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", int(port)))
    server.listen(backlog)
    say("ready")
    return server


def plain(address):
    return address.removeprefix("::ffff:")


def dial(host, port, mark=None, source=None):
    family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    client = socket.socket(family)
    client.settimeout(10)
    if mark is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, int(mark, 0))
    if source is not None:
        client.bind((source, 0))
    client.connect(address)
    return client


def read_all(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def outcome(work):
    """Runs `work`; prints its result, or the name of its error, and the milliseconds that it took."""
    start = time.monotonic()
    try:
        result = work()
    except TimeoutError:
        result = "timeout"
    except OSError as error:
        result = NAMES.get(error.errno, str(error))
    say(result, f"{(time.monotonic() - start) * 1000:.1f}")


# ---- servers ----------------------------------------------------------------------------------------------


def greet(port):
    """Speaks first: tells each client its address and port, then reads to its end."""
    server = listener(port)

    async def serve(reader, writer):
        peer = writer.get_extra_info("peername")
        writer.write(f"you are {plain(peer[0])} {peer[1]}\n".encode())
        try:
            await writer.drain()
            while await reader.read(65536):
                pass
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass

    async def run():
        await (await asyncio.start_server(serve, sock=server, backlog=4096)).serve_forever()

    asyncio.run(run())


def name(port, text):
    """Tells each client who it is, and closes."""
    server = listener(port)
    while True:
        connection, _ = server.accept()
        try:
            connection.sendall(text.encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)
        except OSError:
            pass
        connection.close()


def echo(port):
    """Sends back what it reads, and ends when its client does."""
    server = listener(port)

    async def serve(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass

    async def run():
        await (await asyncio.start_server(serve, sock=server, backlog=4096)).serve_forever()

    asyncio.run(run())


def observe(port):
    """Reads one connection to its end, and says how it ended and how much came."""
    connection, _ = listener(port).accept()
    say("accepted")
    count = 0
    try:
        while part := connection.recv(65536):
            count += len(part)
            say("got", count)
        say("end", count)
    except OSError as error:
        say(NAMES.get(error.errno, str(error)), count)


def hang_up(port):
    """Resets each connection once it has read something."""
    server = listener(port)
    while True:
        connection, _ = server.accept()
        connection.recv(1)
        reset(connection)


def stall(port):
    """Accepts one connection and reads nothing until a line comes on standard input; then counts to the end."""
    connection, _ = listener(port).accept()
    say("accepted")
    sys.stdin.readline()
    say("end", len(read_all(connection)))


def answer_after_end(port):
    """Reads to its client's end, waits for a line on standard input, and then answers with it."""
    server = listener(port)
    connection, _ = server.accept()
    request = read_all(connection)
    say("end", len(request))
    connection.sendall(sys.stdin.readline().encode())
    connection.close()


# ---- clients ----------------------------------------------------------------------------------------------


def look(host, port, mark=None):
    """Connects, says nothing, and tells the first line, or how it failed."""
    outcome(lambda: "said " + dial(host, port, mark).recv(100).decode().strip())


def look_often(count, host, port):
    """The same again and again: how often each answer came, or failure."""
    counts = {}
    for _ in range(int(count)):
        try:
            with dial(host, port) as client:
                answer = client.recv(100).decode().strip() or "end"
        except OSError as error:
            answer = NAMES.get(error.errno, str(error))
        counts[answer] = counts.get(answer, 0) + 1
    say(*(f"{answer}={count}" for answer, count in sorted(counts.items())))


def look_from(source, host, port):
    """The same from a certain address."""
    outcome(lambda: "said " + dial(host, port, source=source).recv(100).decode().strip())


def ask(host, port, text, mark=None, source=None):
    """Connects, sends a line and the end, and tells the answer, or how it failed."""

    def work():
        client = dial(host, port, mark, source)
        client.sendall(text.encode() + b"\n")
        client.shutdown(socket.SHUT_WR)
        return "said " + read_all(client).decode().strip()

    outcome(work)


def datagram(host, port, text):
    """Sends a word and expects no answer."""
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(text.encode(), (host, int(port)))


def send_and_reset(host, port):
    """Sends something and resets once a line comes on standard input."""
    client = dial(host, port)
    client.sendall(b"x" * 1000)
    say("sent")
    sys.stdin.readline()
    reset(client)
    say("reset")


def provoke_reset(host, port):
    """Sends something and tells how the connection ends."""

    def work():
        client = dial(host, port)
        client.sendall(b"x")
        return "said " + read_all(client).decode()

    outcome(work)


def fill(host, port):
    """Writes until nothing more is taken for a second, and tells how much was; then goes on to `end` on standard input."""
    client = dial(host, port)
    client.settimeout(1)
    block, count = b"x" * 65536, 0
    try:
        while True:
            count += client.send(block)
    except TimeoutError:
        say("blocked", count)
    sys.stdin.readline()
    client.settimeout(20)
    client.shutdown(socket.SHUT_WR)
    client.recv(1)
    say("done", count)


def hold(host, port):
    """Keeps one connection: sends each line of standard input and tells what comes back; a reset ends it."""
    client = dial(host, port)
    say("open")
    for line in sys.stdin:
        try:
            client.sendall(line.encode())
            back = b""
            while not back.endswith(b"\n"):
                part = client.recv(65536)
                if not part:
                    return say("end")
                back += part
            say("back", back.decode().strip())
        except OSError as error:
            return say(NAMES.get(error.errno, str(error)))


def wait_for_end(host, port):
    """Opens a connection, reads until it ends and tells how; once open, it says so."""
    client = dial(host, port)
    client.settimeout(60)
    client.sendall(b"hello\n")
    say("open", client.recv(100).decode().strip())
    outcome(lambda: "end " + str(len(read_all(client))))


def flood(host, port, count, at_once):
    """Makes `count` short connections, `at_once` at a time. Each sends a number of its own and must get it back."""
    left, good, errors, ports = iter(range(int(count))), 0, {}, set()

    async def work():
        nonlocal good
        for number in left:
            writer = None
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                ports.add(writer.get_extra_info("sockname")[1])
                writer.write(f"{number}\n".encode())
                writer.write_eof()
                back = await asyncio.wait_for(reader.read(), 30)
                if back != f"{number}\n".encode():
                    raise ValueError(f"got {len(back)} bytes back")
                good += 1
            except (OSError, ValueError, TimeoutError) as error:
                errors[repr(error)] = errors.get(repr(error), 0) + 1
            finally:
                if writer:
                    writer.close()

    async def run():
        await asyncio.gather(*(work() for _ in range(int(at_once))))

    start = time.monotonic()
    asyncio.run(run())
    say("good", good, "of", count, "in", f"{time.monotonic() - start:.1f} s", "errors", errors)


def hold_many(host, port, count, at_once):
    """Opens `count` connections, `at_once` at a time, and keeps all of them; each line of standard input sends a number of
    its own through each, which must come back."""
    held, errors = [], {}

    async def all_at_once(work, items):
        left = iter(items)

        async def some():
            for item in left:
                try:
                    await asyncio.wait_for(work(item), 60)
                except (OSError, ValueError, TimeoutError) as error:
                    errors[repr(error)] = errors.get(repr(error), 0) + 1

        before = sum(errors.values())
        await asyncio.gather(*(some() for _ in range(int(at_once))))
        return sum(errors.values()) - before

    async def use(connection):
        reader, writer = connection
        number = f"{writer.get_extra_info('sockname')[1]}\n".encode()
        writer.write(number)
        if await reader.readexactly(len(number)) != number:
            raise ValueError("somebody else's number")

    async def open_one(_):
        connection = await asyncio.open_connection(host, int(port), limit=1024)
        held.append(connection)
        await use(connection)

    async def run():
        failed = await all_at_once(open_one, range(int(count)))
        say("open", len(held) - failed, "errors", errors)
        while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
            failed = await all_at_once(use, list(held))
            say("good", len(held) - failed, "errors", errors)

    asyncio.run(run())


def attack_for_ever(at_once, attack):
    """`attack` again and again, by so many at once, until the process is ended. Says now and then how many reached their aim."""
    numbers = itertools.count(1)

    def for_ever():
        while True:
            try:
                attack()
            except OSError:
                continue
            if (number := next(numbers)) % 100 == 0:
                say("made", number)

    for _ in range(int(at_once)):
        threading.Thread(target=for_ever, daemon=True).start()
    say("flooding")
    threading.Event().wait()


def flood_ports(host, at_once):
    """Connections, each to another port, on which nobody listens."""
    ports = itertools.cycle(range(20000, 60000))

    def attack():
        with dial(host, next(ports)) as connection:
            try:
                connection.recv(1)
            except ConnectionResetError:
                pass  # The answer, as nobody listens there.

    attack_for_ever(at_once, attack)


def flood_hellos(host, port, at_once):
    """Connections that begin a hello of TLS and stop; each of those who attack holds its last hundred."""
    hello = bytes.fromhex("16030106000100") + b"\x05\xfc\x03\x03" + bytes(60)
    held = threading.local()

    def attack():
        connection = dial(host, port)
        connection.sendall(hello)
        held.__dict__.setdefault("all", collections.deque(maxlen=100)).append(connection)

    attack_for_ever(at_once, attack)


def join_listener(host, port):
    """Tries to listen where somebody else does, the ways a program may try."""
    for option in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        thief = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if option is not None:
            thief.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            thief.bind((host, int(port)))
            thief.listen()
            say("joined")
        except OSError as error:
            say("not joined", errno.errorcode[error.errno])
        thief.close()


verb, *arguments = sys.argv[1:]
globals()[verb.replace("-", "_")](*arguments)
