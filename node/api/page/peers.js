// What peers are called.

import { shortId } from "./format.js";

/** From a peer id to its public name, or the end of the id; of those that are gone the id's end. */
export function peerNames(swarm) {
  const names = new Map();
  for (const model of swarm?.models ?? []) {
    for (const peer of model.peers) names.set(peer.peer_id, peer.public_name ?? shortId(peer.peer_id));
  }
  return (peerId) => names.get(peerId) ?? shortId(peerId);
}
