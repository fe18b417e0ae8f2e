// Before anything is drawn: the colours that were chosen here before.
try {
  const theme = JSON.parse(localStorage.getItem("petals.theme"));
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // No storage is allowed here: the system's colours then.
}
