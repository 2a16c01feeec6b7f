/// A trie over bytes, in flat arrays: about ten bytes a node, where dictionaries would take a hundred.
struct ByteTrie: Sendable {
    // nodes 0 to 255 are the first bytes; the children of a node are a linked list
    private var byte: [UInt8] = (0...255).map { UInt8($0) }
    private var id = [Int32](repeating: -1, count: 256)
    private var child = [Int32](repeating: -1, count: 256)
    private var sibling = [Int32](repeating: -1, count: 256)

    /// Whether every byte is a token by itself, so that anything can be encoded.
    var hasEveryByte: Bool { id[..<256].allSatisfy { $0 >= 0 } }

    /// Add a token of at least one byte.
    mutating func insert(_ token: [UInt8], id newID: Int) {
        guard let first = token.first else { return }
        var node = Int(first)
        for next in token.dropFirst() {
            node = find(next, below: node) ?? add(next, below: node)
        }
        id[node] = Int32(newID)
    }

    /// The longest token that begins at a place, other than some of several bytes; nil if none does.
    func longest(in bytes: [UInt8], from place: Int, except: Set<Int> = []) -> (id: Int, length: Int)? {
        guard place < bytes.count else { return nil }
        var node = Int(bytes[place])
        var found: (id: Int, length: Int)? = id[node] >= 0 ? (Int(id[node]), 1) : nil
        var end = place + 1
        while end < bytes.count, let next = find(bytes[end], below: node) {
            node = next
            end += 1
            if id[node] >= 0, !except.contains(Int(id[node])) { found = (Int(id[node]), end - place) }
        }
        return found
    }

    private func find(_ wanted: UInt8, below node: Int) -> Int? {
        var next = child[node]
        while next >= 0 {
            if byte[Int(next)] == wanted { return Int(next) }
            next = sibling[Int(next)]
        }
        return nil
    }

    private mutating func add(_ new: UInt8, below node: Int) -> Int {
        let number = byte.count
        byte.append(new)
        id.append(-1)
        child.append(-1)
        sibling.append(child[node])
        child[node] = Int32(number)
        return number
    }
}
