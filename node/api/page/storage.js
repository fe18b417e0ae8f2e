// What this browser keeps. Where it may keep nothing, everything works until the page is closed.

function guarded(storage) {
  return {
    read(name, otherwise = null) {
      try {
        const text = storage().getItem(`petals.${name}`);
        return text === null ? otherwise : JSON.parse(text);
      } catch {
        return otherwise;
      }
    },
    write(name, value) {
      try {
        if (value === null) storage().removeItem(`petals.${name}`);
        else storage().setItem(`petals.${name}`, JSON.stringify(value));
      } catch {
        // Full, or forbidden.
      }
    },
  };
}

/** Stays. */
export const lasting = guarded(() => localStorage);

/** Goes with the tab: what is said, and the key. */
export const passing = guarded(() => sessionStorage);
