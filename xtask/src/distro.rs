//! Which Linux this is, and what may be done to it.
use std::fs;
use std::os::unix::fs::MetadataExt as _;

/// Whether this process may install packages.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Linux distributions by their package manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Debian,
    Fedora,
    Arch,
}

impl Family {
    /// This machine's, if it is one of these.
    pub(crate) fn here() -> Option<Family> {
        let mut places = ["/etc/os-release", "/usr/lib/os-release"].iter();
        Family::of(&places.find_map(|place| fs::read_to_string(place).ok())?)
    }

    /// The family that the text of `os-release` names in `ID` or `ID_LIKE`.
    fn of(os_release: &str) -> Option<Family> {
        let value = |key: &str| {
            let mut lines = os_release.lines();
            let value = lines.find_map(|line| line.trim().strip_prefix(key));
            value.unwrap_or_default().trim_matches(['"', '\''])
        };
        let ids = format!("{} {}", value("ID="), value("ID_LIKE="));
        ids.split_whitespace().find_map(|id| match id {
            "debian" | "ubuntu" => Some(Family::Debian),
            "fedora" | "rhel" | "centos" => Some(Family::Fedora),
            "arch" | "archlinux" => Some(Family::Arch),
            _ => None,
        })
    }

    /// The command that installs packages.
    pub(crate) fn installer(self) -> &'static str {
        match self {
            Family::Debian => "apt-get install",
            Family::Fedora => "dnf install",
            Family::Arch => "pacman -S",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_of_os_release() {
        let is = |text: &str, family| assert_eq!(Family::of(text), family, "{text}");
        is(
            "PRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_ID=\"12\"\nID=debian\n",
            Some(Family::Debian),
        );
        is("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Some(Family::Debian));
        is("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", Some(Family::Fedora));
        is("ID=arch\n", Some(Family::Arch));
        is("ID=alpine\n", None);
        is("", None);
    }
}
