//! Who is who in a cluster: its authorities, certificates, keys and the kubeconfigs made of them.
//!
//! All of it is made once, with the cluster. A node has on its disk what its own programs need and nothing more; the
//! key of an authority is on the control plane's node alone.

use super::layout::{API_SERVICE, Cluster, Node};
use anyhow::{Context, Result};
use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A file below `/etc/kubernetes` of a node; only its owner may read it.
#[derive(Debug)]
pub(super) struct Secret {
    pub(super) node: Node,
    pub(super) path: String,
    pub(super) content: String,
}

/// What is made with a cluster.
pub(super) struct Credentials {
    /// The administrator's, for use outside.
    pub(super) kubeconfig: String,
    pub(super) secrets: Vec<Secret>,
}

/// Makes the credentials of a cluster.
pub(super) fn make(cluster: &Cluster) -> Result<Credentials> {
    let (ca, front_proxy, etcd) =
        (Authority::make("kubernetes-ca")?, Authority::make("front-proxy-ca")?, Authority::make("etcd-ca")?);
    let server = format!("https://{}:6443", cluster.node(Node::A));
    let mut secrets = Vec::new();
    let mut put = |node, path: &str, content: &str| {
        secrets.push(Secret { node, path: path.to_owned(), content: content.to_owned() });
    };
    for (name, authority) in [("ca", &ca), ("front-proxy-ca", &front_proxy), ("etcd-ca", &etcd)] {
        put(Node::A, &format!("pki/{name}.crt"), &authority.certificate);
    }
    put(Node::A, "pki/ca.key", &ca.key.serialize_pem());
    put(Node::B, "pki/ca.crt", &ca.certificate);
    // Signs the tokens of service accounts.
    let tokens = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    put(Node::A, "pki/service-accounts.key", &tokens.serialize_pem());
    put(Node::A, "pki/service-accounts.pub", &tokens.public_key_pem());

    let mut of_control_plane = |name: &str, subject: &Subject<'_>, authority: &Authority| -> Result<()> {
        let pair = authority.issue(subject)?;
        put(Node::A, &format!("pki/{name}.crt"), &pair.certificate);
        put(Node::A, &format!("pki/{name}.key"), &pair.key);
        Ok(())
    };
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];
    let addresses = [cluster.node(Node::A).into(), cluster.node_v6(Node::A).into(), API_SERVICE.into(), loopback];
    of_control_plane("apiserver", &Subject::server("kube-apiserver", &names, &addresses), &ca)?;
    of_control_plane("etcd", &Subject::server("etcd", &[], &[loopback, Ipv6Addr::LOCALHOST.into()]), &etcd)?;
    of_control_plane("etcd-client", &Subject::user("kube-apiserver", None), &etcd)?;
    of_control_plane("kubelet-client", &Subject::user("kube-apiserver-kubelet-client", None), &ca)?;
    of_control_plane("front-proxy-client", &Subject::user("front-proxy-client", None), &front_proxy)?;

    for (file, user) in
        [("controller-manager.conf", "system:kube-controller-manager"), ("scheduler.conf", "system:kube-scheduler")]
    {
        put(Node::A, file, &kubeconfig(&server, &ca.certificate, user, &ca.issue(&Subject::user(user, None))?)?);
    }
    for node in Node::ALL {
        let user = "system:kube-proxy";
        put(node, "proxy.conf", &kubeconfig(&server, &ca.certificate, user, &ca.issue(&Subject::user(user, None))?)?);
        let user = format!("system:node:{}", node.name());
        let pair = ca.issue(&Subject::user(&user, Some("system:nodes")))?;
        put(node, "kubelet.conf", &kubeconfig(&server, &ca.certificate, &user, &pair)?);
        let addresses = [cluster.node(node).into(), cluster.node_v6(node).into()];
        let pair = ca.issue(&Subject::server(node.name(), &[node.name()], &addresses))?;
        put(node, "pki/kubelet.crt", &pair.certificate);
        put(node, "pki/kubelet.key", &pair.key);
    }
    let administrator = ca.issue(&Subject::user("admin", Some("system:masters")))?;
    Ok(Credentials { kubeconfig: kubeconfig(&server, &ca.certificate, "admin", &administrator)?, secrets })
}

/// Whom a certificate names: Kubernetes reads a user from the common name and a group from the organization.
struct Subject<'a> {
    user: &'a str,
    group: Option<&'a str>,
    names: &'a [&'a str],
    addresses: &'a [IpAddr],
}

impl<'a> Subject<'a> {
    const fn user(user: &'a str, group: Option<&'a str>) -> Self {
        Self { user, group, names: &[], addresses: &[] }
    }

    const fn server(user: &'a str, names: &'a [&'a str], addresses: &'a [IpAddr]) -> Self {
        Self { user, group: None, names, addresses }
    }
}

/// A certificate and its key in PEM.
struct Pair {
    certificate: String,
    key: String,
}

struct Authority {
    certificate: String,
    parameters: CertificateParams,
    key: KeyPair,
}

impl Authority {
    fn make(name: &str) -> Result<Self> {
        let mut parameters = parameters(name, None)?;
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = parameters.self_signed(&key)?.pem();
        Ok(Self { certificate, parameters, key })
    }

    fn issue(&self, subject: &Subject<'_>) -> Result<Pair> {
        let mut parameters = parameters(subject.user, subject.group)?;
        for name in subject.names {
            parameters.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
        }
        parameters.subject_alt_names.extend(subject.addresses.iter().copied().map(SanType::IpAddress));
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let serves = !parameters.subject_alt_names.is_empty();
        // etcd's own gateway speaks to etcd as a client with the server's certificate.
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if serves {
            parameters.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        parameters.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let issuer = Issuer::from_params(&self.parameters, &self.key);
        let certificate = parameters.signed_by(&key, &issuer).context("a certificate was not signed")?.pem();
        Ok(Pair { certificate, key: key.serialize_pem() })
    }
}

/// A subject and a life that outlasts any cluster for trying things out.
fn parameters(user: &str, group: Option<&str>) -> Result<CertificateParams> {
    let mut parameters = CertificateParams::new(Vec::new())?;
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, user);
    if let Some(group) = group {
        parameters.distinguished_name.push(DnType::OrganizationName, group);
    }
    parameters.not_before = rcgen::date_time_ymd(2025, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2125, 1, 1);
    Ok(parameters)
}

/// A kubeconfig that has all in itself, so that it can be copied to where it is needed.
fn kubeconfig(server: &str, ca: &str, user: &str, pair: &Pair) -> Result<String> {
    let base64 = |pem: &str| base64::engine::general_purpose::STANDARD.encode(pem);
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": {"server": server, "certificate-authority-data": base64(ca)}}],
        "users": [{"name": user, "user": {
            "client-certificate-data": base64(&pair.certificate),
            "client-key-data": base64(&pair.key),
        }}],
        "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": user}}],
        "current-context": "cluster",
    });
    // JSON is YAML.
    Ok(serde_json::to_string_pretty(&config)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn credentials() -> Credentials {
        let cluster = Cluster { name: "dev".to_owned(), number: 9, folder: PathBuf::from("/clusters/dev") };
        make(&cluster).unwrap()
    }

    /// Whether the DER of the first certificate in a PEM contains these bytes.
    fn contains(pem: &str, wanted: &[u8]) -> bool {
        let body: String = pem.lines().skip(1).take_while(|line| !line.starts_with("-----")).collect();
        let der = base64::engine::general_purpose::STANDARD.decode(body).unwrap();
        der.windows(wanted.len()).any(|window| window == wanted)
    }

    #[test]
    fn certificates_name_user_group_and_addresses() {
        let credentials = credentials();
        let file = |node: Node, path: &str| {
            let found = credentials.secrets.iter().find(|secret| secret.node == node && secret.path == path);
            found.unwrap_or_else(|| panic!("{path} of {}", node.name())).content.clone()
        };
        let apiserver = file(Node::A, "pki/apiserver.crt");
        for wanted in [&b"kubernetes.default.svc"[..], &[10, 123, 9, 2], &[10, 96, 0, 1]] {
            assert!(contains(&apiserver, wanted), "{wanted:?}");
        }
        let kubelet: serde_json::Value = serde_json::from_str(&file(Node::B, "kubelet.conf")).unwrap();
        let user = &kubelet["users"][0]["user"]["client-certificate-data"];
        let pem = base64::engine::general_purpose::STANDARD.decode(user.as_str().unwrap()).unwrap();
        let pem = String::from_utf8(pem).unwrap();
        assert!(contains(&pem, b"system:node:b") && contains(&pem, b"system:nodes"));
        assert!(!contains(&pem, b"system:masters"));
        assert_eq!(kubelet["clusters"][0]["cluster"]["server"], "https://10.123.9.2:6443");
    }

    #[test]
    fn no_authority_is_on_the_worker() {
        let on_worker: Vec<Secret> =
            credentials().secrets.into_iter().filter(|secret| secret.node == Node::B).collect();
        let mut paths: Vec<&str> = on_worker.iter().map(|secret| secret.path.as_str()).collect();
        paths.sort_unstable();
        assert_eq!(paths, ["kubelet.conf", "pki/ca.crt", "pki/kubelet.crt", "pki/kubelet.key", "proxy.conf"]);
    }
}
