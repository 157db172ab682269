//! All that a reader can ask of a store.

use polyprag_core::{Document, DocumentId, Error, Keeps, Kind, Result, Store};

/// What a store answered about the ids that it was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    len: u64,
    ids: Vec<DocumentId>,
    each: Vec<Answer>,
    combined: Vec<u32>,
    shared: Vec<(String, Vec<usize>, Vec<u8>)>,
    files: usize,
}

/// Weights, logits and code, in bits, and the record; empty where the codec has none.
type Route = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u8>);

#[derive(Debug, Clone, PartialEq)]
struct Answer {
    id: DocumentId,
    /// None if there is no such document.
    document: Option<Document>,
    /// Bits of weights, logits and code, and the record; none if there is no route.
    route: Option<Route>,
}

/// Of each question the hits: id, docno, bits of the score.
pub type Hits = Vec<Vec<(DocumentId, u64, u32)>>;

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn answer(store: &Store, id: &DocumentId) -> Result<Answer> {
    let one = std::slice::from_ref(id);
    let mut answer = Answer {
        id: id.clone(),
        document: None,
        route: None,
    };
    if !store.contains(id)? {
        return Ok(answer);
    }
    answer.document = store.documents(one)?.pop();
    if store.is_routed(id)? {
        let rows = |kind| Ok(bits(&store.routes(one, kind)?.data));
        let keeps = store.spec()?.codec.keeps();
        answer.route = Some((
            rows(Kind::Weights)?,
            match keeps {
                Keeps::Logits | Keeps::Code => rows(Kind::Logits)?,
                Keeps::Weights => Vec::new(),
            },
            match keeps {
                Keeps::Code => rows(Kind::Code)?,
                Keeps::Logits | Keeps::Weights => Vec::new(),
            },
            store.records(one)?.0,
        ));
    }
    Ok(answer)
}

/// Name, shape and bytes of a tensor.
type Numbers = (String, Vec<usize>, Vec<u8>);

fn experts(store: &Store) -> Result<Vec<Numbers>> {
    let decoder = store.decoder()?.into_iter().flat_map(|(v, b)| [v, b]);
    let tensors = store
        .experts()?
        .into_iter()
        .flat_map(|t| [Some(t.raw), t.scale])
        .flatten()
        .chain(decoder)
        .chain(store.router()?.into_iter().flatten());
    Ok(tensors
        .map(|t| (t.name.clone(), t.shape.clone(), t.bytes().to_vec()))
        .collect())
}

/// Everything but the search, which does not need what the rest needs.
pub fn ask(store: &Store, known: &[DocumentId]) -> Result<Answers> {
    let each: Vec<Answer> = known
        .iter()
        .map(|id| answer(store, id))
        .collect::<Result<_>>()?;
    let routed: Vec<DocumentId> = each
        .iter()
        .filter(|a| a.route.is_some())
        .map(|a| a.id.clone())
        .collect();
    Ok(Answers {
        len: store.len()?,
        ids: store.ids()?.collect::<Result<_>>()?,
        combined: bits(&store.combined_route(&routed, None)?.data),
        each,
        shared: experts(store)?,
        files: store.info()?.parts.len(),
    })
}

pub fn search(store: &Store, questions: &[&str]) -> Result<Hits> {
    questions
        .iter()
        .map(|question| {
            let hits = store.search(question, 10, None)?;
            Ok(hits
                .into_iter()
                .map(|hit| (hit.id, hit.docno, hit.score.to_bits()))
                .collect())
        })
        .collect()
}

/// Asks everything, whatever is answered, and gives the errors.
pub fn poke(store: &Store, known: &[DocumentId], questions: &[&str]) -> Vec<Error> {
    let mut errors = Vec::new();
    for id in known {
        let one = std::slice::from_ref(id);
        errors.extend(store.contains(id).err());
        errors.extend(store.is_routed(id).err());
        errors.extend(store.documents(one).err());
        errors.extend(store.routes(one, Kind::Weights).err());
        errors.extend(store.records(one).err());
        errors.extend(answer(store, id).err());
    }
    errors.extend(store.documents(known).err());
    errors.extend(store.combined_route(known, None).err());
    errors.extend(experts(store).err());
    errors.extend(store.info().err());
    match store.ids() {
        // A store may say that it has any number of documents.
        Ok(ids) => errors.extend(ids.take(10_000).filter_map(Result::err)),
        Err(e) => errors.push(e),
    }
    for question in questions {
        errors.extend(store.search(question, 10, None).err());
    }
    errors
}
