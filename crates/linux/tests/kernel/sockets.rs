//! The options of the data path's sockets, as the kernel has them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use linux::netns::NetNs;
use linux::nft::IpFamily;
use linux::sockets::{
    Listen, bind_address_no_port, inner_client, listener, mark, original_destination, outer_client, reset_on_close,
};
use socket2::{SockRef, Socket, Type};

use crate::namespace::with_privilege;

const BOTH: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

fn loopback_up() {
    linux::links::Links::of(&NetNs::current().unwrap()).unwrap().up("lo").unwrap();
}

fn plain(address: &str) -> Listen<'static> {
    Listen { address: address.parse().unwrap(), backlog: 16, mark: None, owner: None, congestion: None }
}

#[test]
fn what_a_listener_accepts_has_its_mark_and_ends_with_a_reset() {
    with_privilege(what_a_listener_accepts_has_its_mark_and_ends_with_a_reset, || {
        loopback_up();
        for address in ["127.0.0.1:15001", "[::1]:15001"] {
            let listener = listener(Listen { mark: Some(0x77), ..plain(address) }).unwrap();
            listener.set_nonblocking(false).unwrap();
            let mut client = TcpStream::connect(address).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            assert_eq!(mark(&accepted).unwrap(), 0x77);
            assert!(SockRef::from(&accepted).tcp_nodelay().unwrap());
            drop(accepted);
            assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);

            let mut client = TcpStream::connect(address).unwrap();
            let (mut accepted, _) = listener.accept().unwrap();
            accepted.write_all(b"x").unwrap();
            reset_on_close(&accepted, false).unwrap();
            drop(accepted);
            assert_eq!(client.read(&mut [0; 2]).unwrap(), 1);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            client.shutdown(Shutdown::Write).unwrap();
        }
    });
}

#[test]
fn an_urgent_byte_stays_in_the_stream_in_both_directions() {
    with_privilege(an_urgent_byte_stays_in_the_stream_in_both_directions, || {
        loopback_up();
        let listener = listener(plain("127.0.0.1:15001")).unwrap();
        listener.set_nonblocking(false).unwrap();
        let ours = inner_client(IpFamily::V4, 0x78, None).unwrap();
        ours.set_nonblocking(false).unwrap();
        let theirs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        ours.connect(&theirs.local_addr().unwrap().into()).unwrap();
        let client = TcpStream::connect("127.0.0.1:15001").unwrap();
        for (theirs, ours) in [(client, listener.accept().unwrap().0), (theirs.accept().unwrap().0, ours.into())] {
            let (mut theirs, mut ours): (TcpStream, TcpStream) = (theirs, ours);
            theirs.write_all(b"be").unwrap();
            SockRef::from(&theirs).send_out_of_band(b"f").unwrap();
            theirs.write_all(b"ore").unwrap();
            theirs.shutdown(Shutdown::Write).unwrap();
            let mut all = String::new();
            ours.read_to_string(&mut all).unwrap();
            assert_eq!(all, "before");
        }
    });
}

#[test]
fn a_listener_is_alone_on_its_port() {
    with_privilege(a_listener_is_alone_on_its_port, || {
        loopback_up();
        let first = listener(plain("0.0.0.0:15006")).unwrap();
        let second = listener(plain("127.0.0.1:15006")).unwrap_err();
        assert_eq!(second.errno(), Some(nix::libc::EADDRINUSE));
        assert!(second.to_string().starts_with("cannot listen on 127.0.0.1:15006: "));
        let thief = Socket::new(socket2::Domain::IPV4, Type::STREAM, None).unwrap();
        thief.set_reuse_port(true).unwrap();
        thief.set_reuse_address(true).unwrap();
        let address: SocketAddr = "0.0.0.0:15006".parse().unwrap();
        let stolen = thief.bind(&address.into()).and_then(|()| thief.listen(1));
        assert_eq!(stolen.unwrap_err().kind(), ErrorKind::AddrInUse);
        // IPv6 only, so that both families have the same port.
        listener(plain("[::]:15006")).unwrap();
        drop(first);
    });
}

#[test]
fn a_listener_has_the_owner_that_it_was_given() {
    with_privilege(a_listener_has_the_owner_that_it_was_given, || {
        loopback_up();
        let made = listener(Listen { owner: Some(4_000_000_001), ..plain("127.0.0.1:15001") });
        match made {
            Ok(listener) => {
                let file = std::fs::File::from(listener.as_fd().try_clone_to_owned().unwrap());
                assert_eq!(file.metadata().unwrap().uid(), 4_000_000_001);
            }
            // One uid is mapped: there is no second one to give the socket to.
            Err(error) => assert_eq!(error.errno(), Some(nix::libc::EINVAL)),
        }
    });
}

#[test]
fn client_sockets_have_one_mark_and_only_inner_ones_are_transparent() {
    with_privilege(client_sockets_have_one_mark_and_only_inner_ones_are_transparent, || {
        loopback_up();
        for family in BOTH {
            let transparent = |socket: &Socket| match family {
                IpFamily::V4 => socket.ip_transparent_v4().unwrap(),
                IpFamily::V6 => socket.ip_transparent_v6().unwrap(),
            };
            let stranger: SocketAddr = match family {
                IpFamily::V4 => "192.0.2.7:4000".parse().unwrap(),
                IpFamily::V6 => "[2001:db8::7]:4000".parse().unwrap(),
            };
            let outer = outer_client(family, 1, Some("cubic")).unwrap();
            assert_eq!((mark(&outer).unwrap(), transparent(&outer)), (1, false));
            assert!(outer.tcp_congestion().unwrap().starts_with(b"cubic"));
            let refused = outer.bind(&stranger.into()).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::AddrNotAvailable);

            let inner = inner_client(family, 2, Some("no-such-thing")).unwrap();
            assert_eq!((mark(&inner).unwrap(), transparent(&inner)), (2, true));
            bind_address_no_port(&inner).unwrap();
            inner.bind(&stranger.into()).unwrap();
            for socket in [outer, inner] {
                assert!(socket.nonblocking().unwrap() && socket.tcp_nodelay().unwrap());
                assert_eq!(socket.linger().unwrap(), Some(std::time::Duration::ZERO));
            }
        }
    });
}

#[test]
fn a_connection_that_was_not_captured_has_no_original_destination() {
    with_privilege(a_connection_that_was_not_captured_has_no_original_destination, || {
        loopback_up();
        for address in ["127.0.0.1:15001", "[::1]:15001"] {
            let listener = listener(plain(address)).unwrap();
            listener.set_nonblocking(false).unwrap();
            let _client = TcpStream::connect(address).unwrap();
            let (accepted, client) = listener.accept().unwrap();
            let error = original_destination(&accepted, IpFamily::of(client.ip())).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::ENOENT));
        }
    });
}
