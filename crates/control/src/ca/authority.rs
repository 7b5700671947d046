//! The certificate authority's state: a root's certificate and an intermediate with its key, in a folder or (by
//! `kubernetes::secret`) in a Secret.
//!
//! The root's key exists while the intermediate is made and is never written. What is there is checked before it is
//! used: whoever could have changed it, or read the key, is not trusted with an identity of the whole mesh.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::issuer::{Intermediate, IntermediateError, IssueError, Root, WorkloadToCertify};
use identity::key::KeyError;
use identity::svid::SvidError;
use identity::{PrivateKey, SpiffeId, Svid, TrustBundle, TrustDomain, UnixTime, bundle, csr};
use zeroize::Zeroizing;

use crate::problem::Problem;
use crate::{CONTROL_SERVICE_ACCOUNT, ROOT_NAMESPACE};

pub(crate) const ROOT: &str = "root.pem";
pub(crate) const INTERMEDIATE: &str = "intermediate.pem";
pub(crate) const INTERMEDIATE_KEY: &str = "intermediate.key";

/// How long the mesh can run on one authority. Without the root's key there is no second intermediate under the same root, so
/// that both end at the same time.
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// From here on the end of the intermediate is a problem.
const WARN_BEFORE_END: Duration = Duration::from_secs(30 * 24 * 3600);
/// What to do about a folder's authority that is at its end or no good.
const NEW_FOLDER: &str = "give an empty --ca directory for a new authority";
/// The largest file that is read; a root or a key has some hundreds of bytes.
const MAX_FILE: u64 = 64 * 1024;

/// Signs for workloads of one trust domain.
#[derive(Debug)]
pub(crate) struct Authority {
    place: String,
    /// What to do when it comes to its end.
    remedy: &'static str,
    bundle: TrustBundle,
    intermediate: Intermediate,
}

/// An authority as text: what a folder or a Secret holds.
pub(crate) struct Pem {
    pub(crate) root: String,
    pub(crate) intermediate: String,
    pub(crate) key: Zeroizing<String>,
}

/// Why there is no authority. The operator's to mend.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthorityError {
    #[error("cannot use {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{} is not a directory; give one with --ca", .0.display())]
    NotADirectory(PathBuf),
    #[error("{} belongs to another user or others may write to it; make it yours alone (chmod 700)", .0.display())]
    Writable(PathBuf),
    #[error("{} can be read by others, and with it anybody's identity could be forged; make a new --ca directory", .0.display())]
    Readable(PathBuf),
    #[error("{} is larger than {MAX_FILE} bytes, and is not what was written there", .0.display())]
    TooLarge(PathBuf),
    #[error("{place}: {error}")]
    Bundle { place: String, error: bundle::BundleError },
    #[error("{place}: {error}; {remedy}")]
    Intermediate { place: String, error: IntermediateError, remedy: &'static str },
    #[error("cannot make a certificate authority: {0}")]
    Issue(#[from] IssueError),
    #[error("cannot make a certificate authority: {0}")]
    NewBundle(bundle::BundleError),
    #[error("cannot make a key: {0}")]
    Key(#[from] KeyError),
    #[error("cannot make the control plane's own certificate: {0}")]
    Request(#[from] csr::RequestError),
    #[error("cannot make the control plane's own certificate: {0}")]
    Svid(#[from] SvidError),
}

impl Authority {
    /// Whether a folder has an authority already: another control plane ran with it.
    pub(crate) fn is_in(directory: &Path) -> bool {
        directory.join(ROOT).exists()
    }

    /// Loads the authority of a folder, or makes one where there is none.
    pub(crate) fn open(directory: &Path, trust_domain: &TrustDomain, now: UnixTime) -> Result<Self, AuthorityError> {
        check_directory(directory)?;
        // The root is written last: without it the rest is what an interrupted start left behind.
        if directory.join(ROOT).try_exists().map_err(at(directory))? {
            Self::load(directory, trust_domain, now)
        } else {
            Self::make(directory, trust_domain, now)
        }
    }

    fn load(directory: &Path, trust_domain: &TrustDomain, now: UnixTime) -> Result<Self, AuthorityError> {
        let pem = Pem {
            root: read(&directory.join(ROOT))?,
            intermediate: read(&directory.join(INTERMEDIATE))?,
            key: read_secret(&directory.join(INTERMEDIATE_KEY))?,
        };
        Self::from_pem(&directory.display().to_string(), NEW_FOLDER, &pem, trust_domain, now)
    }

    /// Takes what a place holds, if it is an authority of this trust domain.
    pub(crate) fn from_pem(
        place: &str,
        remedy: &'static str,
        pem: &Pem,
        trust_domain: &TrustDomain,
        now: UnixTime,
    ) -> Result<Self, AuthorityError> {
        let bundle = TrustBundle::from_pem(trust_domain.clone(), &pem.root)
            .map_err(|error| AuthorityError::Bundle { place: format!("{place}, {ROOT}"), error })?;
        let intermediate = Intermediate::from_pem(&pem.intermediate, &pem.key, &bundle, now)
            .map_err(|error| AuthorityError::Intermediate { place: place.to_owned(), error, remedy })?;
        Ok(Self { place: place.to_owned(), remedy, bundle, intermediate })
    }

    fn make(directory: &Path, trust_domain: &TrustDomain, now: UnixTime) -> Result<Self, AuthorityError> {
        let authority = Self::generate(&directory.display().to_string(), NEW_FOLDER, trust_domain, now)?;
        let pem = authority.to_pem()?;
        replace(&directory.join(INTERMEDIATE_KEY), pem.key.as_bytes(), 0o600)?;
        replace(&directory.join(INTERMEDIATE), pem.intermediate.as_bytes(), 0o600)?;
        replace(&directory.join(ROOT), pem.root.as_bytes(), 0o600)?;
        Ok(authority)
    }

    /// Makes a new one, which is nowhere but here yet. The root's key is gone when this returns.
    pub(crate) fn generate(
        place: &str,
        remedy: &'static str,
        trust_domain: &TrustDomain,
        now: UnixTime,
    ) -> Result<Self, AuthorityError> {
        let root = Root::generate(trust_domain, now, LIFETIME)?;
        let intermediate = root.issue_intermediate(now, LIFETIME)?;
        let bundle = root.bundle().map_err(AuthorityError::NewBundle)?;
        Ok(Self { place: place.to_owned(), remedy, bundle, intermediate })
    }

    /// All of it, to be written down.
    pub(crate) fn to_pem(&self) -> Result<Pem, AuthorityError> {
        let pem = self.intermediate.to_pem()?;
        Ok(Pem { root: self.bundle.to_pem(), intermediate: pem.chain, key: pem.key })
    }

    pub(crate) fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    pub(crate) fn intermediate(&self) -> &Intermediate {
        &self.intermediate
    }

    /// A new identity document for the control plane itself, with a new key.
    pub(crate) fn own_svid(&self, now: UnixTime, lifetime: Duration) -> Result<Svid, AuthorityError> {
        let id = control_identity(self.bundle.trust_domain());
        let key = PrivateKey::generate()?;
        let request = csr::CertificateRequest::new(&key)?;
        let public = csr::PublicKeyOfRequest::from_pem(request.as_pem())?;
        let chain = self.intermediate.sign(&WorkloadToCertify::assertion(id.clone()), &public, now, lifetime)?;
        Ok(Svid::assemble(key, chain, &self.bundle, &id, now)?)
    }

    /// That the intermediate comes to its end, when it does.
    pub(crate) fn problem(&self, now: UnixTime) -> Option<Problem> {
        let left = self.intermediate.validity().not_after().as_secs().saturating_sub(now.as_secs());
        (left < WARN_BEFORE_END.as_secs()).then(|| {
            let message = format!(
                "the intermediate certificate ends in {} hours, and with it every certificate of the mesh; {}",
                left / 3600,
                self.remedy
            );
            Problem::error(&self.place, message)
        })
    }
}

/// The identity under which nodes know the control plane.
pub(crate) fn control_identity(trust_domain: &TrustDomain) -> SpiffeId {
    SpiffeId::new(trust_domain, ROOT_NAMESPACE, CONTROL_SERVICE_ACCOUNT)
        .expect("a trust domain has at most 255 bytes, and the rest are constants of allowed characters")
}

/// Publishes the roots for nodes that start: the whole file or none of it.
pub(crate) fn publish(bundle: &TrustBundle, path: &Path) -> Result<(), AuthorityError> {
    replace(path, bundle.to_pem().as_bytes(), 0o644)
}

fn check_directory(directory: &Path) -> Result<(), AuthorityError> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(at(directory)(error)),
    }
    let metadata = fs::metadata(directory).map_err(at(directory))?;
    if !metadata.is_dir() {
        return Err(AuthorityError::NotADirectory(directory.to_owned()));
    }
    // The kernel shows a process's own folder as belonging to whom the process runs as.
    let own_uid = fs::metadata("/proc/self").map_err(at(Path::new("/proc/self")))?.uid();
    if metadata.uid() != own_uid || metadata.permissions().mode() & 0o022 != 0 {
        return Err(AuthorityError::Writable(directory.to_owned()));
    }
    Ok(())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> AuthorityError + use<> {
    let path = path.to_owned();
    move |error| AuthorityError::Io { path, error }
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    read_file(File::open(path).map_err(at(path))?, path).map(|text| text.to_string())
}

fn read_secret(path: &Path) -> Result<Zeroizing<String>, AuthorityError> {
    let file = File::open(path).map_err(at(path))?;
    if file.metadata().map_err(at(path))?.permissions().mode() & 0o077 != 0 {
        return Err(AuthorityError::Readable(path.to_owned()));
    }
    read_file(file, path)
}

fn read_file(file: File, path: &Path) -> Result<Zeroizing<String>, AuthorityError> {
    // All of the room from the start: a buffer that grows leaves copies behind that nobody wipes.
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE as usize + 1));
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(at(path))?;
    if text.len() as u64 > MAX_FILE {
        return Err(AuthorityError::TooLarge(path.to_owned()));
    }
    Ok(text)
}

/// Puts a file in place of the one before, so that a reader sees the old one or the new one, also after a power cut.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), AuthorityError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let next = path.with_file_name(format!(".{name}.next"));
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&next)(error)),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&next).map_err(at(&next))?;
    // The process's umask may have taken away what readers need.
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(at(&next))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(at(&next))?;
    fs::rename(&next, path).map_err(at(path))?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(at(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn at_second(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    const NOW: u64 = 1_800_000_000;

    fn trust_domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    #[test]
    fn an_authority_is_made_once_and_loaded_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca");
        let first = Authority::open(&path, &trust_domain(), at_second(NOW)).unwrap();
        let second = Authority::open(&path, &trust_domain(), at_second(NOW + 5)).unwrap();
        assert_eq!(first.bundle(), second.bundle());
        for authority in [first, second] {
            let svid = authority.own_svid(at_second(NOW + 5), DAY).unwrap();
            assert_eq!(svid.id().as_str(), "spiffe://cluster.local/ns/justmtls-system/sa/justmtls-control");
        }
    }

    #[test]
    fn the_folder_holds_no_key_but_the_intermediates_and_nobody_else_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca");
        Authority::open(&path, &trust_domain(), at_second(NOW)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).unwrap().map(Result::unwrap) {
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
            let text = fs::read_to_string(entry.path()).unwrap();
            assert_eq!(text.contains("PRIVATE KEY"), entry.file_name() == INTERMEDIATE_KEY, "{entry:?}");
            names.push(entry.file_name());
        }
        names.sort();
        assert_eq!(names, [INTERMEDIATE_KEY, INTERMEDIATE, ROOT]);
    }

    #[test]
    fn a_start_that_was_interrupted_is_begun_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca");
        Authority::open(&path, &trust_domain(), at_second(NOW)).unwrap();
        fs::remove_file(path.join(ROOT)).unwrap();
        Authority::open(&path, &trust_domain(), at_second(NOW)).unwrap().own_svid(at_second(NOW), DAY).unwrap();
    }

    #[test]
    fn what_others_could_have_read_or_changed_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca");
        Authority::open(&path, &trust_domain(), at_second(NOW)).unwrap();
        let open = || Authority::open(&path, &trust_domain(), at_second(NOW)).err().unwrap().to_string();
        fs::set_permissions(path.join(INTERMEDIATE_KEY), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(open().contains("intermediate.key can be read by others"), "{}", open());
        fs::set_permissions(path.join(INTERMEDIATE_KEY), fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(open().contains("chmod 700"), "{}", open());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Authority::open(&file, &trust_domain(), at_second(NOW)).err().unwrap();
        assert!(matches!(error, AuthorityError::NotADirectory(_)), "{error}");
    }

    #[test]
    fn anothers_key_and_an_authority_past_its_end_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| directory.path().join(name));
        for path in [&one, &two] {
            Authority::open(path, &trust_domain(), at_second(NOW)).unwrap();
        }
        let late = NOW + LIFETIME.as_secs() + 1;
        let error = Authority::open(&one, &trust_domain(), at_second(late)).err().unwrap().to_string();
        assert!(error.contains("expired") && error.contains("--ca"), "{error}");
        fs::copy(two.join(INTERMEDIATE_KEY), one.join(INTERMEDIATE_KEY)).unwrap();
        let error = Authority::open(&one, &trust_domain(), at_second(NOW)).err().unwrap().to_string();
        assert!(error.contains("does not belong to its certificate"), "{error}");
    }

    #[test]
    fn the_end_of_the_intermediate_is_announced() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(&directory.path().join("ca"), &trust_domain(), at_second(NOW)).unwrap();
        assert_eq!(authority.problem(at_second(NOW)), None);
        let near = NOW + LIFETIME.as_secs() - 2 * 24 * 3600;
        assert!(authority.problem(at_second(near)).unwrap().message.contains("ends in 4"));
    }

    #[test]
    fn a_bundle_is_published_whole_for_everybody_to_read() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(&directory.path().join("ca"), &trust_domain(), at_second(NOW)).unwrap();
        let path = directory.path().join("bundle.pem");
        fs::write(&path, "before").unwrap();
        publish(authority.bundle(), &path).unwrap();
        assert_eq!(
            TrustBundle::from_pem(trust_domain(), &fs::read_to_string(&path).unwrap()).unwrap(),
            *authority.bundle()
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }
}
