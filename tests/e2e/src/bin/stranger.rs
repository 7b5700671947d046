//! Asks a control plane for a certificate, with whatever token and identity somebody wants to try: run on a node by the tests on a
//! cluster. It says what it was given, or which sentence it was refused with.

#![forbid(unsafe_code)]

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use identity::PrivateKey;
use identity::csr::CertificateRequest;
use rustls::time_provider::DefaultTimeProvider;
use wire::client::{ControlPlane, Role, control_address};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [control, bundle, token, identity] = &arguments[..] else {
        return Err("usage: stranger CONTROL-PLANE BUNDLE TOKEN SPIFFE-ID".into());
    };
    let folder = tempfile::Builder::new().prefix("justmtls-e2e-").tempdir_in("/dev/shm")?;
    let (bundle_file, token_file) = (folder.path().join("bundle"), folder.path().join("token"));
    std::fs::write(&bundle_file, bundle)?;
    std::fs::write(&token_file, token)?;
    let plane = ControlPlane {
        address: control_address(control)?,
        bundle_file,
        token_file,
        node: "whoever".to_owned(),
        role: Role::Proxy,
        time: Arc::new(DefaultTimeProvider),
    };
    let request = CertificateRequest::new(&PrivateKey::generate()?)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let chain = runtime.block_on(async {
        let connected = plane.connect().await?;
        Ok::<_, Box<dyn Error>>(connected.certify(request.as_pem(), &identity.parse()?, DAY).await?)
    })?;
    println!("a certificate and {} above it", chain.len() - 1);
    Ok(())
}
