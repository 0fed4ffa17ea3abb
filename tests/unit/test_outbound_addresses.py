from ipaddress import IPv4Address, IPv4Network, IPv6Address
from urllib.parse import urlsplit

import pytest
import yarl
from hypothesis import given
from hypothesis import strategies as st

from nodes.outbound_http import OutboundPolicy, OutboundRefused, require_allowed_address
from nodes.url_targets import MAX_URL_CHARACTERS, is_public, parse_target, redact_url, unmap_ipv4


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://Example.COM:443/A?b#c", "https://example.com/A?b"),
        ("http://example.com.:8080?q=1", "http://example.com:8080/?q=1"),
        ("http://a_b.example/x@y:z", "http://a_b.example/x@y:z"),
        ("http://straße.example/ü?ö=%20", "http://xn--strae-oqa.example/%C3%BC?%C3%B6=%20"),
        ("http://\uff18.\uff18.\uff18.\uff18/", "http://8.8.8.8/"),
        ("http://8\u30028\u30028\u30028/", "http://8.8.8.8/"),
        ("http://8.8.8.8./", "http://8.8.8.8/"),
        ("http://[2606:4700:0::1111]:080/", "http://[2606:4700::1111]/"),
    ],
)
def test_a_url_is_rebuilt_from_its_parts(url: str, canonical: str) -> None:
    assert parse_target(url).url == canonical


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "http\u017f://example.com/",
        "//example.com/",
        "example.com",
        "http:example.com",
        "http:///example.com",
        "http://",
        "http://./",
        "http://.example.com/",
        "http://a..example.com/",
        "http://example.com../",
        "http://user@example.com/",
        "http://user:password@example.com/",
        "http://@example.com/",
        "http://example.com\\@127.0.0.1/",
        "http://example.com\\/",
        "http://exa mple.com/",
        "http://example.com/a b",
        " http://example.com/",
        "http://example.com/\n",
        "http://example.com/\r\nHost: other",
        "http://exa\tmple.com/",
        "http://example.com/\x00",
        "http://example.com/\u00a0",
        "http://example.com/\u2028",
        "http://example.com/\ud800",
        "http://127.0.0.1\u2100.example/",
        "http://example\uff0fcom/",
        "http://example.com%2f@127.0.0.1/",
        "http://%31%32%37.0.0.1/",
        "http://example.com:0/",
        "http://example.com:65536/",
        "http://example.com:/",
        "http://example.com:8o/",
        "http://example.com:٨٠/",
        "http://example.com:80:80/",
        f"http://{'a' * 64}.example/",
        f"http://{'a.' * 130}example/",
        f"http://example.com/{'a' * MAX_URL_CHARACTERS}",
        # one address, 127.0.0.1, as resolvers read it
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7F.0.0.1/",
        "http://017700000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.1/",
        "http://127.0.0.0x1/",
        "http://127.0.0.01/",
        "http://127.0.0.1.2/",
        "http://0/",
        "http://0x/",
        "http://[127.0.0.1]/",
        "http://[::1/",
        "http://::1/",
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::1]x/",
        "http://[v1.a]/",
    ],
)
def test_a_url_that_two_readers_could_read_differently_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="the URL"):
        parse_target(url)


HOSTS = st.one_of(
    st.sampled_from(["example.com", "127.0.0.1", "[::1]", "0x7f.1", "\uff18.8.8.8", "straße.example"]),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
)
PIECES = st.lists(st.one_of(st.sampled_from(list("@:/?#[]\\%.;&=\t \u3002")), HOSTS), max_size=6)


@given(PIECES.map(lambda pieces: "http://" + "".join(pieces)))
def test_every_other_reader_reads_an_accepted_url_as_we_do(url: str) -> None:
    try:
        target = parse_target(url)
    except ValueError:
        return
    assert parse_target(target.url) == target
    for host, port in (
        (urlsplit(target.url).hostname, urlsplit(target.url).port),
        (yarl.URL(target.url).raw_host, yarl.URL(target.url).explicit_port),
    ):
        assert (host, port or 80) == (target.host, target.port)


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("/b?c", "https://example.com:8443/b?c"),
        ("b", "https://example.com:8443/a/b"),
        ("?q", "https://example.com:8443/a/x?q"),
        ("//other.example/b", "https://other.example/b"),
        ("http://10.0.0.1/", "http://10.0.0.1/"),
    ],
)
def test_a_redirect_may_be_relative(reference: str, url: str) -> None:
    assert parse_target(reference, base="https://example.com:8443/a/x").url == url


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.9",
        "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255",
        "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "168.63.129.16", "::", "::1", "::2", "100::1", "2001::1", "2001:2::1", "2001:10::1", "2001:20::1",
        "2001:db8::1", "2002::1", "3fff::1", "5f00::1", "64:ff9b:1::1", "fc00::1", "fd00:ec2::254",
        "fd20:ce::254", "fe80::1", "fec0::1", "ff02::1", "ff0e::1",
    ],
)  # fmt: skip
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(unmap_ipv4(address))


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "192.0.1.1", "2606:4700::1111", "2a00:1450::1"],
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(unmap_ipv4(address))


@given(st.ip_addresses(v=4))
def test_no_ipv4_address_hides_in_an_ipv6_address(inner: IPv4Address) -> None:
    number = int(inner)
    assert unmap_ipv4(f"::ffff:{inner}") == inner
    for disguise in (
        IPv6Address(number),  # IPv4-compatible
        IPv6Address(0xFFFF << 48 | number),  # SIIT ::ffff:0:a.b.c.d
        IPv6Address(0x0064_FF9B << 96 | number),  # NAT64
        IPv6Address(0x0064_FF9B_0001 << 80 | number),  # NAT64 of a local prefix
        IPv6Address(0x2002 << 112 | number << 80),  # 6to4
        IPv6Address(0x2001_0000 << 96 | number << 64),  # Teredo, as its server
        IPv6Address(0x2001_0000 << 96 | number ^ 0xFFFF_FFFF),  # Teredo, as its client
    ):
        assert not is_public(disguise)


@pytest.mark.parametrize(
    ("port", "is_allowed"), [(80, True), (443, True), (8080, True), (22, False), (25, False)]
)
def test_of_the_privileged_ports_only_those_of_the_web_are_asked(port: int, *, is_allowed: bool) -> None:
    target = parse_target(f"http://example.com:{port}/")
    if is_allowed:
        require_allowed_address(OutboundPolicy(), target, IPv4Address("8.8.8.8"))
    else:
        with pytest.raises(OutboundRefused, match=r"Port .*PILOTFLAME_OUTBOUND_ALLOWED_NETWORKS"):
            require_allowed_address(OutboundPolicy(), target, IPv4Address("8.8.8.8"))


def test_an_allowed_network_is_open_on_every_port_and_nothing_beside_it() -> None:
    policy = OutboundPolicy(allowed_networks=(IPv4Network("10.1.0.0/16"),))
    target = parse_target("http://inside.example:22/")
    require_allowed_address(policy, target, IPv4Address("10.1.255.1"))
    with pytest.raises(
        OutboundRefused, match=r"inside.example is not a public address.*PILOTFLAME_OUTBOUND_ALLOWED_NETWORKS"
    ):
        require_allowed_address(policy, target, IPv4Address("10.2.0.1"))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://api.example.com/v2/orders/17?page=3", "https://api.example.com/v2/orders/17?page=…"),
        ("https://example.com/a?b=1&c&d=#f", "https://example.com/a?b=…&…&d=…"),
        ("https://ada:pw@example.com/", ""),
        ("https://hooks.slack.com/services/T024BE7LD/B0/x", "https://hooks.slack.com/services/…/B0/x"),
        (
            "https://discord.com/api/webhooks/123456789012345678/a-bC1dEfGh2",
            "https://discord.com/api/webhooks/…/…",
        ),
        ("https://api.telegram.org/bot123456:AAH-x/getMe", "https://api.telegram.org/…/getMe"),
        ("https://x.example/0f8fad5b-d9cb-469f-a165-70867728950e/report", "https://x.example/…/report"),
        ("https://x.example/a;key=s3cr/b?AKIAIOSFODNN7EXAMPLE=1", "https://x.example/a;key=…/b?…=…"),
        ("https://x.example/" + "word-" * 100, "https://x.example/…"),
        ("https://x.example/" + "word/" * 100, "https://x.example/" + "word/" * 56 + "w…"),
    ],
)
def test_an_error_shows_a_url_without_possible_secrets(url: str, text: str) -> None:
    assert redact_url(url) == text
